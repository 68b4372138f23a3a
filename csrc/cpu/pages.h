// defines: Pages: memory for a large result, on pages that were there before
//
// Every fresh page is cleared by the kernel when it is first written: for a gradient of 50 MiB that takes as long as writing it
// three times. malloc gives memory of this size back to the system as soon as it is freed, so each gradient pays anew. Here
// the last mapping that was freed waits for the next result. Its pages are marked as free (MADV_FREE): the system takes them
// wherever it is short of memory, and until then they cost nothing to write.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "memory.h"

namespace minillm::cpu {

class Pages {
public:
    explicit Pages(size_t bytes) : mapping(spare.exchange(nullptr)) {
        if (mapping != nullptr && mapping->bytes >= bytes) return;
        mapping.reset();
        mapping.reset(new Mapping(bytes));
    }
    ~Pages() {
#ifdef MADV_FREE
        madvise(mapping->data, mapping->bytes, MADV_FREE);
#endif
        delete spare.exchange(mapping.release());
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    char* data() const { return mapping->data; }
    size_t bytes() const { return mapping->bytes; }

private:
    struct Mapping {
        char* data;
        size_t bytes;
        // Whole huge pages: mapped with one to spare, and what lies before and behind them is given back.
        explicit Mapping(size_t wanted) : bytes((wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE) {
            void* p = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (p == MAP_FAILED) throw std::bad_alloc();
            char* const first = static_cast<char*>(p);
            const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(p) % HUGE_PAGE) % HUGE_PAGE;
            data = first + before;
            if (before > 0) munmap(first, before);
            munmap(data + bytes, HUGE_PAGE - before);
            advise_huge_pages(data, data + bytes);
        }
        ~Mapping() { munmap(data, bytes); }
    };
    static inline std::atomic<Mapping*> spare{nullptr};  // left to the system at the end of the process
    std::unique_ptr<Mapping> mapping;
};

}  // namespace minillm::cpu
