"""Where rows lie in memory: strides without a copy, and offsets beyond 32 bits."""

import oracle
import pytest
import torch
from cases import BF16, FP32, NAMES, Case

from minillm_kernels import distill_stats, fused_divergence_loss, fused_rkl_loss, mixed_sample, token_logprobs

VIEWS = {
    "shifted": lambda x: x[:, :-1],  # logits[:, :-1]: two strides
    "every-other-row": lambda x: x[:, ::2],
    "first-of-each": lambda x: x[:, 0],
    "columns-cut": lambda x: x[..., 3:-5],
    "cut-and-shifted": lambda x: x[:, 1:, :-7],
    "transposed-rows": lambda x: x.transpose(0, 1),
    "repeated-row": lambda x: x[:1, :1].expand(2, 4, -1),
    "repeated-inner": lambda x: x[:, :1].expand(-1, 5, -1),
    "length-1-dimensions": lambda x: x[:, None, 1:, None],
    "one-row": lambda x: x[1, 2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_a_view_is_its_copy(backend, view, dtype):
    """Same bits from the strided rows as from contiguous ones; the teacher is strided otherwise."""
    s, t = Case(2100, (4, 6), dtype, BF16).logits()
    s, t = view(s), view(t)
    copy = s.contiguous().clone()
    ids = torch.randint(copy.shape[-1], copy.shape[:-1])
    uniforms = torch.rand(*copy.shape[:-1], 2, dtype=torch.float64)
    results = []
    for student, teacher in ((copy, t.contiguous()), (s, t.contiguous()), (s, t), (copy, t)):
        x = student.detach().requires_grad_()
        stats = distill_stats(x, teacher, ids)
        jsd = fused_divergence_loss(x, teacher, "jsd", reduction="none")
        logprobs = token_logprobs(x, ids)
        grad = oracle.gradient(sum(f.sum() for f in (*stats, jsd, logprobs) if f.requires_grad), x)
        results.append((*stats, jsd, logprobs, grad, *mixed_sample(x, teacher, uniforms=uniforms)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("view", [VIEWS[n] for n in ("shifted", "cut-and-shifted", "transposed-rows")])
def test_in_place_through_a_view_touches_nothing_else(backend, view):
    base = torch.randn(4, 6, 2100)
    logits, untouched = view(base), base.clone()
    t = torch.randn(logits.shape)
    expected = oracle.gradient(fused_rkl_loss(x := logits.clone().requires_grad_(), t), x)
    view(untouched).copy_(expected)
    fused_rkl_loss(logits.requires_grad_(), t, inplace=True).backward()
    assert torch.equal(base, untouched)


def test_no_copy_is_made_of_strided_logits(core):
    """Of logits[:, :-1] a copy would be 4 MB."""
    s, t = torch.randn(8, 33, 4096)[:, :-1], torch.randn(8, 33, 4096)[:, :-1]
    ids = torch.zeros(8, 32, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused_rkl_loss(s, t)
        distill_stats(s, t, ids)
        mixed_sample(s, t)
    assert sum(max(e.self_cpu_memory_usage, 0) for e in profile.events()) < 1 << 18


def test_rows_at_any_byte(backend):
    """A view of bytes: values, gradients and samples are those of the copy."""
    for dtype in (FP32, BF16):
        size, pair, uniforms = torch.empty(0, dtype=dtype).element_size(), [], torch.rand(3, 2, dtype=torch.float64)
        for x in Case(2065, (3,), dtype, dtype).logits():
            buffer = bytearray(1 + 3 * 2065 * size)
            view = torch.frombuffer(buffer, dtype=dtype, offset=1).view(3, 2065)
            pair.append((x, view.copy_(x)))
            assert view.data_ptr() % size
        ids, results = torch.tensor([0, 5, 2064]), []
        for s, t in zip(*pair, strict=True):
            if backend == "cuda" and s.data_ptr() % size:  # a GPU reads no element across its own size
                with pytest.raises(ValueError, match="rows are aligned to their elements"):
                    fused_rkl_loss(s, t)
                return
            s = s.requires_grad_()
            stats, jsd = distill_stats(s, t, ids), fused_divergence_loss(s, t, "jsd")
            drawn = mixed_sample(s, t, uniforms=uniforms, top_k=50)
            (grad,) = torch.autograd.grad(stats.reverse_kl.sum() + jsd + stats.student_entropy.sum(), s)
            (over,) = torch.autograd.grad(fused_rkl_loss(s, t, inplace=True), s)
            results.append([*stats, jsd, *drawn, grad, over])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)  # Triton starts its tiles where a row is aligned


def _far_apart(rows: int, V: int, gap: int) -> torch.Tensor:
    """[rows, V] bf16, `gap` elements from row to row. Only the rows are written, and so committed."""
    try:
        storage = torch.empty((rows - 1) * gap + V, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve {((rows - 1) * gap + V) * 2 >> 30} GiB of address space: {error}")
    far = storage.as_strided((rows, V), (gap, 1))
    far.copy_(torch.randn(rows, V))
    return far


def test_offsets_beyond_32_bits(instruction_set):
    """The third row starts 2^31 + 14 elements after the first, more than 2^32 bytes."""
    far = _far_apart(3, 2100, 2**30 + 7)
    near, t = far.clone(), torch.randn(3, 2100)
    ids = torch.tensor([0, 5, 2099])
    uniforms = torch.rand(3, 2, dtype=torch.float64)
    for a, b in zip(distill_stats(far, t, ids), distill_stats(near, t, ids), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(distill_stats(t, far, ids), distill_stats(t, near, ids), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        mixed_sample(far, far, uniforms=uniforms), mixed_sample(near, near, uniforms=uniforms), strict=True
    ):
        assert torch.equal(a, b)
    for loss in (lambda s, **k: fused_rkl_loss(s, t, **k), lambda s, **k: fused_divergence_loss(s, t, "jsd", **k)):
        x, y, z = far.detach().requires_grad_(), near.clone().requires_grad_(), far.detach().requires_grad_()
        expected = oracle.gradient(loss(y), y)
        assert torch.equal(oracle.gradient(loss(x), x), expected)
        before = far.clone()
        oracle.gradient(loss(z, inplace=True), z)  # written over the far rows
        assert torch.equal(far, expected)
        far.copy_(before)
