"""impl="tiled": equal to the loss on logits in float64, value and gradients; what it refuses; what it allocates."""

import pytest
import torch
from linear_cases import CAP, Case, H, N, T, V, assert_close, plain_logits

import minillm_kernels as mk
from minillm_kernels import available_backends, use_backend
from minillm_kernels.hidden import operands, tiled

if available_backends()["triton"] != "ok" or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter: " + available_backends()["triton"], allow_module_level=True)

OPTIONS = {"temperature": T, "impl": "tiled"}


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_losses(divergence, dtype, cap, monkeypatch):
    """In vocabulary tiles of 128 columns, the last one short; rows without weight hold NaN, and are not read."""
    monkeypatch.setattr(tiled, "GRADIENT_BYTES", 1)
    case = Case(dtype)
    truth, ours = case.leaves(), case.leaves()
    wanted = mk.fused_divergence_loss(
        *plain_logits(truth, case.teacher, cap), divergence, case.labels, weights=case.weights, temperature=T
    )
    wanted.mul(1.7).backward()
    with torch.no_grad():
        ours[0][case.labels == -100] = torch.nan
    args = (*case.models(ours, cap), divergence, case.labels)
    loss = mk.fused_linear_divergence_loss(*args, weights=case.weights, **OPTIONS)
    loss.mul(1.7).backward()
    assert mk.last_backend() == "triton"
    assert [x.grad.dtype for x in ours] == [dtype] * 3
    assert_close([loss.detach(), *(x.grad for x in ours)], [wanted.detach(), *(x.grad for x in truth)], dtype)
    assert (ours[0].grad[case.labels == -100] == 0).all()


@pytest.mark.parametrize("cap", [None, CAP])
def test_float16_under_a_loss_scale(cap, monkeypatch):
    """A share of 1e-6 in the loss, times a probability, is 0 in float16; the scale brings it back."""
    monkeypatch.setattr(tiled, "GRADIENT_BYTES", 1)
    case, options = Case(torch.float16), {"normalizer": 1e6, "temperature": T}
    truth, ours = case.leaves(), case.leaves()
    wanted = mk.fused_rkl_loss(*plain_logits(truth, case.teacher, cap), case.labels, **options)
    loss = mk.fused_linear_rkl_loss(*case.models(ours, cap), case.labels, impl="tiled", **options)
    for x in (wanted, loss):
        (x * 2.0**20).backward()
    assert_close([loss.detach(), *(x.grad for x in ours)], [wanted.detach(), *(x.grad for x in truth)], torch.float16)


def test_statistics_and_their_gradient():
    case = Case(torch.float32)
    fields = ("reverse_kl", "student_logprobs", "student_entropy", "student_logsumexp")
    truth, ours = case.leaves(), case.leaves()
    wanted = mk.distill_stats(*plain_logits(truth, case.teacher, None), case.labels, temperature=T)
    stats = mk.fused_linear_distill_stats(*case.models(ours), case.labels, **OPTIONS)
    for x in (wanted, stats):
        sum((i + 1) * getattr(x, f).sum() for i, f in enumerate(fields)).backward()
    assert_close([*stats, *(x.grad for x in ours)], [*wanted, *(x.grad for x in truth)], torch.float32)

    head = mk.Head(*case.student[1:])
    logprobs = mk.fused_linear_token_logprobs(case.student[0], head, case.labels, impl="tiled")
    z = case.student[0].double() @ case.student[1].double().t() + case.student[2].double()
    assert_close([logprobs], [mk.token_logprobs(z, case.labels)], torch.float32)


def test_the_minillm_loss():
    case = Case(torch.float32)
    rows = {"advantages": torch.randn(N), "old_logprobs": -torch.rand(N) - 6}
    results = []
    for impl in ("chunked", "tiled"):
        leaves = case.leaves()
        args = (*leaves[:2], *case.teacher[:2], case.labels)
        out = mk.fused_linear_minillm_loss(*args, entropy_coef=0.1, impl=impl, **rows)
        out.loss.backward()
        results.append([out.loss.detach(), out.reverse_kl, out.entropy, leaves[0].grad, leaves[1].grad])
    assert_close(*results, torch.float32)


def test_same_bits_again_and_frozen_parts():
    case = Case(torch.float32)
    results = []
    for _ in range(2):
        hidden, weight, _ = case.leaves()
        mk.fused_linear_rkl_loss(hidden, weight.detach(), *case.teacher[:2], impl="tiled").backward()
        results.append(hidden.grad)
        assert weight.grad is None
    assert torch.equal(*results)
    nothing = mk.fused_linear_rkl_loss(hidden[:0], weight, case.teacher[0][:0], case.teacher[1], impl="tiled")
    assert nothing == 0


def test_no_tensor_of_the_logits_size():
    """The largest allocation of the forward pass is a row's parts; of the backward pass, the gradient's buffer."""
    case = Case(torch.float32)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mk.fused_linear_distill_stats(*case.student[:2], *case.teacher[:2], case.labels.clamp(min=0), impl="tiled")
    assert max(e.self_cpu_memory_usage for e in profile.events()) < N * V * 4 // 4


def test_refusals():
    case = Case(torch.float32)
    args = (*case.student[:2], *case.teacher[:2])
    with pytest.raises(NotImplementedError, match=r'impl="tiled" computes reverse_kl.*; jsd.*use impl="chunked"'):
        mk.fused_linear_divergence_loss(*args, "jsd", impl="tiled")
    with pytest.raises(ValueError, match="has no chunks: leave it out"):
        mk.fused_linear_rkl_loss(*args, impl="tiled", chunk_rows=8)
    with pytest.raises(ValueError, match='impl must be "chunked" or "tiled"'):
        mk.fused_linear_rkl_loss(*args, impl="fast")
    with use_backend("reference"), pytest.raises(RuntimeError, match="runs on the triton backend, not on 'reference'"):
        mk.fused_linear_rkl_loss(*args, impl="tiled")
    with pytest.raises(RuntimeError, match="not float64"):
        mk.fused_linear_rkl_loss(*(x.double() for x in args), impl="tiled")
    with pytest.raises(ValueError, match="needs the last dimension contiguous"):
        weight = torch.randn(H, V).t()
        mk.fused_linear_rkl_loss(args[0], weight, *args[2:], impl="tiled")


def test_gradients_that_nobody_wants_share_no_memory():
    """torch's operators may not return one tensor twice."""
    student = operands.Projection(torch.zeros(2, H), torch.zeros(V, H), None, 0.0, 1.0)
    for needs in ([False, False, False], [True, False, True]):
        found = tiled.empty_gradients(student, needs)
        assert len({x.untyped_storage()._cdata for x in found}) == 3


@pytest.mark.parametrize("name", ["linear_stats", "linear_stats_loss"])
def test_opcheck(name):
    case = Case(torch.float32)
    settings = ([0.0, 0.0], [1.0, 1.0], 1.0, V, "tiled", None, False, "triton")
    args = {
        "linear_stats": (case.labels.clamp(min=0), case.labels != -100),
        "linear_stats_loss": (None, None, torch.rand(5, N), [True, True, True]),
    }[name]
    torch.library.opcheck(getattr(torch.ops.minillm, name).default, (*args, *case.leaves(), *case.teacher, *settings))
