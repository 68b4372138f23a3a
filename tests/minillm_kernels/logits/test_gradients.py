"""The autograd protocol: in place, twice, under checkpoint, under autocast, several outputs in one backward pass."""

from contextlib import nullcontext

import oracle
import pytest
import torch
from cases import BF16, FP16, FP32, NAMES, Case
from tolerance import HALF_ULP
from torch.utils.checkpoint import checkpoint

from minillm_kernels import (
    distill_loss,
    distill_stats,
    fused_divergence_loss,
    fused_rkl_loss,
    minillm_loss,
    token_logprobs,
    use_backend,
)

LOSSES = {
    "reverse_kl": lambda s, t, **k: fused_rkl_loss(s, t, **k),
    "forward_kl": lambda s, t, **k: fused_divergence_loss(s, t, "forward_kl", **k),
    "jsd": lambda s, t, **k: fused_divergence_loss(s, t, "jsd", **k),
    "tvd": lambda s, t, **k: fused_divergence_loss(s, t, "tvd", **k),
}
IDS = torch.tensor([3, 0, 516])


def _logits(dtype=FP32):
    return Case(517, (3,), dtype).logits()


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=NAMES.get)
def test_in_place_is_out_of_place(implementation, loss_of, dtype):
    """Same bits, in the memory of the logits, for a contiguous tensor, a strided view and rows that do not count."""
    s, t = _logits(dtype)
    weights = torch.tensor([1.0, 0.0, 2.5])
    for view in (lambda x: x.clone(), lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]):
        leaf = s.clone().requires_grad_()
        loss_of(view(leaf), t, weights=weights, vocab_size=500).backward()

        inplace_leaf = s.clone().requires_grad_()
        logits = view(inplace_leaf)
        logits.retain_grad()
        at = logits.data_ptr()
        loss = loss_of(logits, t, weights=weights, vocab_size=500, inplace=True)
        loss.backward()
        assert torch.equal(inplace_leaf.grad, leaf.grad)
        assert logits.data_ptr() == at
        assert torch.equal(logits.detach(), leaf.grad)  # the logits are gone, the gradient stands in their place


@pytest.mark.parametrize("name", [*LOSSES, "statistics", "minillm"])
def test_float16_keeps_what_a_loss_scale_saves(implementation, name):
    """A share of 1e-6 in the loss is 0 in float16. The scale is in the coefficients before anything is rounded."""
    loss_of = {
        **LOSSES,
        "statistics": lambda s, t, **k: distill_loss(s, t, IDS, forward_kl=1e-6, student_logprobs=-1e-6).loss,
        "minillm": lambda s, t, **k: minillm_loss(s, t, IDS, advantages=ones, old_logprobs=-6 * ones, **k).loss,
    }[name]
    ones, found = torch.ones(3), []
    s, t = _logits(FP16)
    for student, teacher in ((s.clone(), t), (s.double(), t.double())):
        student.requires_grad_()
        with nullcontext() if student.dtype == FP16 else use_backend("reference"):
            (loss_of(student, teacher, normalizer=1e6) * 2.0**20).backward()
        found.append(student.grad.double())
    assert (found[0] - found[1]).norm() <= HALF_ULP[FP16] * found[1].norm()


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_allocates_nothing_of_the_size_of_the_logits(inplace):
    s, t = torch.randn(64, 4096, requires_grad=True), torch.randn(64, 4096)
    logits = s * 1.0
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(fused_rkl_loss(logits, t, inplace=inplace), logits)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert (allocated >= logits.nbytes) == (not inplace)


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_a_second_backward_after_in_place_is_an_error(backend, loss_of):
    s, t = _logits()
    s.requires_grad_()
    loss = loss_of(s * 1.0, t, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_tells_another_user_of_the_logits(backend):
    s, t = _logits()
    logits = s.requires_grad_() * 1.0
    loss = fused_rkl_loss(logits, t, inplace=True)
    other = logits.square().sum()  # saves the logits too
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_a_second_backward_out_of_place_adds(backend, loss_of):
    s, t = _logits()
    s.requires_grad_()
    loss = loss_of(s, t)
    loss.backward(retain_graph=True)
    once = s.grad.clone()
    loss.backward()
    assert torch.equal(s.grad, 2 * once)


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_double_backward_is_refused(backend, loss_of):
    s, t = _logits()
    s.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(s, t), s, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*without create_graph=True"):
        grad.square().sum().backward()


def test_a_teacher_that_requires_grad_is_an_error():
    s, t = _logits()
    t.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher_logits require a gradient.*teacher_logits.detach\(\)"):
        fused_rkl_loss(s, t)
    with torch.no_grad():
        fused_rkl_loss(s, t)  # no gradient is taken: nothing to refuse


def test_weights_and_coefficients_are_constants():
    s, t = _logits()
    weights = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"weights require a gradient, but are constants.*weights.detach\(\)"):
        fused_rkl_loss(s, t, weights=weights)
    with pytest.raises(ValueError, match=r"reverse_kl require a gradient, but are constants"):
        distill_loss(s, t, reverse_kl=weights)


@pytest.mark.parametrize("field", oracle.DIFFERENTIABLE)
def test_each_field_alone(implementation, field):
    """One coefficient at a time: the others' formulas are not evaluated, and nothing of them may remain."""
    s, t = _logits()
    leaf, x = s.double().requires_grad_(), s.clone().requires_grad_()
    upstream = torch.tensor([1.5, -0.25, 3.0])
    truth = oracle.gradient((oracle.statistics(leaf, t, IDS)[field] * upstream).sum(), leaf)
    actual = oracle.gradient((getattr(distill_stats(x, t, IDS), field) * upstream).sum(), x)
    torch.testing.assert_close(actual.double(), truth, rtol=2e-5, atol=1e-6)


def test_fields_together_are_the_sum_of_fields_alone(backend):
    s, t = _logits()
    x = s.requires_grad_()
    stats = distill_stats(x, t, IDS)
    alone = sum(oracle.gradient(getattr(distill_stats(x, t, IDS), f).sum(), x) for f in oracle.DIFFERENTIABLE)
    together = oracle.gradient(sum(getattr(stats, f).sum() for f in oracle.DIFFERENTIABLE), x)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_row", [0, 1, 2])
def test_a_zero_upstream_gradient_does_not_read_the_row(implementation, zero_row):
    """Clipped policy-gradient terms send many: the row's NaN then stays where it is."""
    s, t = _logits()
    s[zero_row] = torch.nan
    s.requires_grad_()
    upstream = torch.ones(3)
    upstream[zero_row] = 0
    fused_rkl_loss(s, t, reduction="none").backward(upstream)
    assert torch.equal(s.grad[zero_row], torch.zeros(517)) and s.grad.isfinite().all()


def _all_of_it(s, t):
    stats = distill_stats(s, t, IDS)
    logprobs, entropy = token_logprobs(s, IDS, return_entropy=True)
    losses = sum(loss(s, t) for loss in LOSSES.values())
    return losses + sum(getattr(stats, f).sum() for f in oracle.DIFFERENTIABLE) + (logprobs - entropy).sum()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    s, t = _logits()
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    _all_of_it(a, t).backward()
    checkpoint(_all_of_it, b, t, use_reentrant=use_reentrant).backward()
    assert torch.equal(a.grad, b.grad)


def test_checkpoint_recomputes_what_in_place_overwrote(backend):
    s, t = _logits()
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    fused_rkl_loss(a * 2, t).backward()
    checkpoint(lambda x: fused_rkl_loss(x * 2, t, inplace=True), b, use_reentrant=False).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_autocast_changes_nothing(backend, dtype):
    s, t = _logits(dtype)
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    plain = _all_of_it(a, t)
    plain.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = _all_of_it(b, t)
        under.backward()
    assert under.dtype == FP32 and torch.equal(plain, under) and torch.equal(a.grad, b.grad)


def test_gradient_is_dense_and_like_the_logits(backend):
    for view in (
        torch.randn(2, 5, 60)[:, :-1],
        torch.randn(60),
        torch.randn(6, 60)[::2],
        torch.randn(1, 60).expand(3, 60),
    ):
        x = view.detach().requires_grad_()
        grad = oracle.gradient(fused_rkl_loss(x, torch.randn(view.shape)), x)
        assert grad.shape == x.shape and grad.is_contiguous()
