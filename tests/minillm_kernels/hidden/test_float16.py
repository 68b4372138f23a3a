"""fused_linear_* in float16: no gradient is lost that the type of the result holds, with and without a loss scale."""

import functools

import pytest
import torch
from tolerance import HALF_ULP
from torch import Tensor

import minillm_kernels as mk
from minillm_kernels.hidden.float16 import LARGEST, in_units
from minillm_kernels.hidden.operands import operands

N, H, V = 600, 16, 2000  # flat rows: a probability of 1/2000, a share of 1/480 in the mean


def drawn(n: int = N) -> tuple[list[Tensor], Tensor]:
    """Hidden states and heads of both models, and tokens."""
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(*shape, generator=generator) for shape in ((n, H), (V, H), (n, H), (V, H))]
    for weight in models[1::2]:
        weight *= 0.5 / H**0.5
    ids = torch.randint(V, (n,), generator=generator)
    ids[::5] = -100
    return [x.half() for x in models], ids


def minillm(models, ids, **options) -> Tensor:
    """Nearly the single-step part alone: of the policy's gradient the token's own column would hide all others."""
    rows = {"advantages": torch.full((len(ids),), 1e-3), "old_logprobs": torch.full((len(ids),), -7.6)}
    return mk.fused_linear_minillm_loss(*models, ids, **rows, **options).loss


LOSSES = {
    "rkl": lambda models, ids, **o: mk.fused_linear_rkl_loss(*models, ids, **o),
    "weighted": lambda models, ids, **o: mk.fused_linear_rkl_loss(
        *models, weights=torch.linspace(0.5, 2, len(ids)), reduction="mean", **o
    ),
    "jsd": lambda models, ids, **o: mk.fused_linear_divergence_loss(*models, "jsd", ids, **o),
    "rows": lambda models, ids, **o: mk.fused_linear_rkl_loss(*models, ids, reduction="none", **o).mean(),
    "rows of jsd": lambda models, ids, **o: mk.fused_linear_divergence_loss(
        *models, "jsd", ids, reduction="none", **o
    ).mean(),
    "distill": lambda models, ids, **o: (
        mk.fused_linear_distill_loss(
            *models, ids, forward_kl=0.5 / N, reverse_kl=torch.full((len(ids),), 0.5 / N), **o
        ).loss
    ),
    "minillm": minillm,
    "statistics": lambda models, ids, **o: mk.fused_linear_distill_stats(*models, ids, **o).forward_kl.mean(),
}


def gradients(name: str, models: list[Tensor], ids: Tensor, scale: float, **options) -> list[Tensor]:
    """The loss, and the gradients of the student's hidden states and weight, without the scale, in float64."""
    leaves = [x.clone().requires_grad_() for x in models[:2]]
    loss = LOSSES[name]([*leaves, *models[2:]], ids, **options)
    (loss * scale).backward()
    return [loss.detach().double(), *(x.grad.double() / scale for x in leaves)]


@functools.cache
def exact_gradients(name: str) -> list[Tensor]:
    models, ids = drawn()
    with mk.use_backend("reference"):
        return gradients(name, [x.double() for x in models], ids, 1.0)


def assert_nothing_is_lost(found: list[Tensor], exact: list[Tensor], scale: float) -> None:
    """Beside the rounding of the result itself there is that of the logits and of their gradient."""
    torch.testing.assert_close(found[0], exact[0], rtol=1e-4, atol=0)
    for ours, truth in zip(found[1:], exact[1:], strict=True):
        rounding = ((truth * scale).half().double() / scale - truth).norm()
        assert (ours - truth).norm() <= rounding + HALF_ULP[torch.float16] * truth.norm()


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize(
    ("backend", "name"), [*(("cpu", name) for name in LOSSES), ("reference", "rkl"), ("reference", "jsd")]
)
def test_equals_float64(backend, name, scale):
    if (reason := mk.available_backends()[backend]) != "ok":
        pytest.skip(reason)
    models, ids = drawn()
    with mk.use_backend(backend):
        found = gradients(name, models, ids, scale, chunk_rows=160)
    assert_nothing_is_lost(found, exact_gradients(name), scale)


@pytest.mark.parametrize("name", ["rkl", "distill", "minillm"])
def test_compiles_into_one_graph(name):
    models, ids = drawn(20)
    found = []
    for fn in (LOSSES[name], torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in models[:2]]
        (fn([*leaves, *models[2:]], ids) * 65536).backward()
        found.append([x.grad for x in leaves])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rkl", "distill", "minillm"])
def test_a_second_backward_pass_adds(name):
    models, ids = drawn(20)
    hidden = models[0].clone().requires_grad_()
    loss = LOSSES[name]([hidden, *models[1:]], ids)
    loss.backward(torch.tensor(65536.0), retain_graph=True)
    once = hidden.grad.clone()
    loss.backward(torch.tensor(65536.0))
    assert once.any() and torch.equal(hidden.grad, 2 * once)


def test_a_ratio_that_overflows_where_the_clip_acts_has_no_gradient():
    """exp(log q - old) is infinite, the clipped branch a constant: only KL(q || p) is left."""
    models, ids = drawn(20)
    found = []
    for advantages in (torch.ones(20), torch.zeros(20)):
        hidden = models[0].clone().requires_grad_()
        rows = {"advantages": advantages, "old_logprobs": torch.full((20,), -200.0 * float(advantages[0]))}
        mk.fused_linear_minillm_loss(hidden, *models[1:], ids, **rows).loss.backward()
        found.append(hidden.grad)
    assert found[1].any()
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_unit():
    """A power of two that lifts the largest coefficient over the temperature to 32 at least, and lowers none."""
    models, _ids = drawn(4)
    heads = operands((models[0], mk.Head(models[1])), None, "chunked", None, False, 0.5, None)
    for largest in (0.0, 1e-40, 3e-9, 1 / 600, 1.0, 31.9, 32.0, 1e30):
        coefficients = torch.tensor([largest, -largest / 3, torch.nan, torch.inf])
        lifted, unit = in_units(coefficients, heads)
        torch.testing.assert_close(lifted * unit, coefficients, rtol=0, atol=0, equal_nan=True)
        assert unit.frexp().mantissa == 0.5 and 0 < unit <= 1
        if largest >= 1e-9:
            assert unit == 1 if largest >= 32 else LARGEST / 2 <= lifted[0] / 0.5 < LARGEST
    float32 = operands((models[0].float(), mk.Head(models[1].float())), None, "chunked", None, False, 0.5, None)
    assert in_units(coefficients, float32) == (coefficients, None)
