// defines: Context: where a fiber goes on; host_cuda_switch, which changes the stack; SANITIZED
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#else
#define SANITIZED 0
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host_cuda {

struct Context {
#ifdef __x86_64__
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    void* fake_stack = nullptr;
};

#ifdef __x86_64__
// Saves the registers that a call preserves, changes the stack, restores them.
extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
    .text
    .globl host_cuda_switch
    .type host_cuda_switch, @function
host_cuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size host_cuda_switch, . - host_cuda_switch
)");
#endif

}  // namespace host_cuda
