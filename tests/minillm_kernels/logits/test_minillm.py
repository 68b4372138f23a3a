"""minillm_loss and fused_linear_minillm_loss: the formulas of policy.py composed in plain float64 PyTorch."""

import itertools

import pytest
import torch

import minillm_kernels as mk

N, H, V = 29, 16, 257  # 29: no multiple of a chunk; 257: one column beyond whole registers


def problem(seed: int = 0) -> dict[str, torch.Tensor]:
    """A rollout whose ratios lie below, inside and above the clip range, with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    data = {
        "hidden": draw(N, H),
        "weight": draw(V, H) * 0.3,
        "teacher_hidden": draw(N, H),
        "teacher_weight": draw(V, H),
    }
    data["token_ids"] = torch.randint(V, (N,), generator=generator)
    now = mk.token_logprobs(data["hidden"] @ data["weight"].t(), data["token_ids"])
    data["old_logprobs"] = now + 0.3 * draw(N)
    data["importance_weights"] = torch.rand(N, generator=generator, dtype=torch.float64) + 0.5
    data["advantages"] = draw(N)
    data["mask"] = torch.rand(N, generator=generator) > 0.3
    data["counted"] = torch.where(data["mask"], data["token_ids"], -100)
    return data


def composed(logits, teacher_logits, data, *, clip, single_step, weighted, entropy_coef, normalizer):
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    w, advantage = data["importance_weights"], data["advantages"]
    ratio = (q.gather(-1, data["token_ids"][:, None]).squeeze(-1) - data["old_logprobs"]).exp() * w
    policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    single = single_step * (w if weighted else 1) * (q.exp() * (q - p)).sum(-1)
    entropy = -(q.exp() * q).sum(-1)
    per_token = (policy + single - entropy_coef * entropy) * data["mask"]
    return per_token.sum() / (data["mask"].sum() if normalizer is None else normalizer)


CONSTANTS = ("advantages", "old_logprobs", "importance_weights")
SETTINGS = list(itertools.product([0.2, 0.05], [1.0, 0.0], [True, False], [0.0, 0.3], [None, 50.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("clip", "single_step", "weighted", "entropy_coef", "normalizer"), SETTINGS)
def test_value_and_gradients(dtype, clip, single_step, weighted, entropy_coef, normalizer):
    data = problem()
    hidden, weight = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
    settings = {"single_step": single_step, "entropy_coef": entropy_coef, "normalizer": normalizer}
    teacher_logits = data["teacher_hidden"] @ data["teacher_weight"].t()
    truth = composed(hidden @ weight.t(), teacher_logits, data, clip=clip, weighted=weighted, **settings)
    truth.backward()
    options = {name: data[name] for name in CONSTANTS} | settings
    options |= {"clip_range": clip, "weight_single_step": weighted}
    for fused in (False, True):
        h, w = (data[x].to(dtype, copy=True).requires_grad_() for x in ("hidden", "weight"))
        teacher = data["teacher_hidden"].to(dtype), data["teacher_weight"].to(dtype)
        if fused:
            result = mk.fused_linear_minillm_loss(h, w, *teacher, data["counted"], chunk_rows=6, **options)
        else:
            result = mk.minillm_loss(h @ w.t(), teacher_logits.to(dtype), data["counted"], **options)
        result.loss.backward()
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5
        for actual, wanted in ((result.loss, truth), (h.grad, hidden.grad), (w.grad, weight.grad)):
            assert (actual - wanted).abs().max() <= tolerance * (1e-3 + wanted.abs().max()), fused
        assert not any(x.requires_grad for x in result[1:])
        parts = result.policy_loss + result.single_step_loss
        if entropy_coef == 0:
            assert torch.allclose(parts, result.loss.detach(), atol=1e-6)


def test_outputs_for_logging():
    data = problem()
    logits, teacher_logits = data["hidden"] @ data["weight"].t(), data["teacher_hidden"] @ data["teacher_weight"].t()
    options = {name: data[name] for name in CONSTANTS}
    result = mk.minillm_loss(logits, teacher_logits, data["counted"], **options)
    stats = mk.distill_stats(logits, teacher_logits, data["counted"])
    assert torch.equal(result.reverse_kl, stats.reverse_kl)
    assert torch.equal(result.entropy, stats.student_entropy)
    assert torch.equal(result.student_logprobs, stats.student_logprobs)
    assert torch.equal(result.teacher_logprobs, stats.teacher_logprobs)
    ratio = (stats.student_logprobs - data["old_logprobs"]).exp() * data["importance_weights"]
    smaller = ratio.clamp(0.8, 1.2) * data["advantages"] < ratio * data["advantages"]
    assert 0 < result.clip_fraction < 1
    assert result.clip_fraction.item() == pytest.approx(
        (smaller & data["mask"]).sum().item() / data["mask"].sum().item()
    )


def test_masked_tokens_may_hold_anything():
    data = problem()
    logits, teacher_logits = data["hidden"] @ data["weight"].t(), data["teacher_hidden"] @ data["teacher_weight"].t()
    clean = mk.minillm_loss(logits, teacher_logits, data["counted"], **{name: data[name] for name in CONSTANTS})
    out = ~data["mask"]
    logits[out], data["advantages"][out], data["old_logprobs"][out] = torch.nan, torch.nan, torch.inf
    logits.requires_grad_()
    dirty = mk.minillm_loss(logits, teacher_logits, data["counted"], **{name: data[name] for name in CONSTANTS})
    dirty.loss.backward()
    assert dirty.loss == clean.loss
    assert (logits.grad[out] == 0).all() and logits.grad.isfinite().all()


def test_nothing_valid_gives_zero():
    data = problem()
    logits = (data["hidden"] @ data["weight"].t()).requires_grad_()
    options = {name: data[name] for name in CONSTANTS}
    result = mk.minillm_loss(logits, logits.detach(), torch.full((N,), 7), ignore_index=7, **options)
    result.loss.backward()
    assert result.loss == 0 and result.clip_fraction == 0 and (logits.grad == 0).all()


def test_constants_that_require_a_gradient_are_refused():
    data = problem()
    logits = data["hidden"] @ data["weight"].t()
    for name in ("advantages", "old_logprobs", "importance_weights"):
        options = {x: data[x] for x in CONSTANTS}
        options[name] = options[name].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name} require a gradient"):
            mk.minillm_loss(logits, logits, data["token_ids"], **options)
    with pytest.raises(ValueError, match="clip_range"):
        mk.minillm_loss(logits, logits, data["token_ids"], clip_range=-1.0, **{x: data[x] for x in CONSTANTS})


@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(inplace):
    logits, teacher = torch.randn(3, 60, requires_grad=True), torch.randn(3, 60)
    ids, rows = torch.tensor([5, -100, 59]), (torch.randn(3), torch.randn(3), None)
    args = (logits, teacher, ids, *rows, None, 7.0, -100, 0.2, 1.0, True, 0.1, inplace, 0.7, 60, "reference")
    skipped = (
        "test_aot_dispatch_dynamic" if inplace else ""
    )  # it uses the logits again, which are the gradient by then
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.minillm.minillm_loss.default
    torch.library.opcheck(operator, args, test_utils=[name for name in utilities if name != skipped])


def test_rows_that_do_not_count_have_gradient_0_whatever_arrives():
    logits, teacher, zeros = torch.randn(3, 60, requires_grad=True), torch.randn(3, 60), torch.zeros(3)
    loss = mk.minillm_loss(logits, teacher, torch.tensor([5, -100, 59]), advantages=zeros, old_logprobs=zeros).loss
    (loss * torch.nan).backward()
    assert (logits.grad[1] == 0).all() and logits.grad[[0, 2]].isnan().all()
