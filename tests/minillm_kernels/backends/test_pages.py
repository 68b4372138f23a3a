"""A large gradient of the CPU backend takes the pages of the one that was freed before it."""

import resource
import threading

import pytest
import torch

import minillm_kernels as mk
from minillm_kernels.backends import cpu

if mk.available_backends()["cpu"] != "ok":
    pytest.skip("the CPU backend is not built", allow_module_level=True)

N, V = 70, 131072  # 35 MiB


@pytest.fixture(scope="module")
def logits():
    return torch.randn(N, V, requires_grad=True), torch.randn(N, V)


def gradient(logits, **options):
    student, teacher = logits
    student.grad = None
    mk.fused_rkl_loss(student, teacher, **options).backward()
    grad, student.grad = student.grad, None
    return grad


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_the_pages_of_a_freed_gradient_are_used_again(logits):
    found = []
    for _ in range(5):
        before = faults()
        grad = gradient(logits)
        found.append(faults() - before)
        assert grad.isfinite().all()
        grad.fill_(float("nan"))
        del grad
    assert min(found) < 10, found  # of 18 huge pages, or 8960 small ones


def test_what_is_not_written_by_the_kernel_is_zero_on_used_pages(logits):
    gradient(logits).fill_(float("nan"))
    weights = (torch.arange(N) % 2).float()
    grad = gradient(logits, weights=weights, vocab_size=V - 3)
    assert not grad[::2].any() and not grad[:, -3:].any()
    assert grad[1::2, :-3].isfinite().all()


def test_a_gradient_that_is_in_use_is_left_alone(logits):
    held = gradient(logits)
    copy = held.clone()
    others = [gradient(logits, temperature=0.5) for _ in range(2)]
    assert len({x.data_ptr() for x in (held, *others)}) == 3
    assert torch.equal(held, copy) and torch.equal(*others)


def test_threads_never_share_pages():
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            x = cpu.gradient_like(torch.empty(N + number, V))
            x[:: N // 5].fill_(number)
            wrong.append(not (x[:: N // 5] == number).all())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80 and not any(wrong)


def test_a_size_that_no_machine_has_is_an_error():
    with pytest.raises(MemoryError):
        cpu.operations.Pages(1 << 60)
    assert gradient((torch.randn(N, V, requires_grad=True), torch.randn(N, V))).isfinite().all()
