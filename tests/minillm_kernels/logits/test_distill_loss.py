"""distill_loss: in float64 the sum written out, value and gradient; rows that do not count; what it refuses."""

import oracle
import pytest
import torch

from minillm_kernels import distill_loss, fused_rkl_loss

IDS = torch.tensor([[5, -100, 0], [256, 3, -100]])  # of 257 tokens: one beyond whole registers
COEFFICIENTS = {
    "numbers": {"forward_kl": 0.4, "student_logprobs": -0.6},
    "rows": {"reverse_kl": torch.tensor([[1.0, 2.0, 0.0], [0.5, 3.0, 1.0]]), "student_entropy": -0.1},
    "columns": {"student_logsumexp": torch.tensor([[2.0], [0.0]]), "student_logprobs": torch.tensor(-1.0)},
    "all": dict(zip(oracle.DIFFERENTIABLE, (0.3, -0.2, 1.1, 0.7, -0.4), strict=True)),
}


def logits(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return (3 * torch.randn(2, 3, 257, generator=generator)).to(dtype), torch.randn(2, 3, 257, generator=generator)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_is_the_sum_written_out(backend, name, teacher, inplace):
    given = COEFFICIENTS[name]
    if not teacher:
        given = {k: c for k, c in given.items() if k not in ("reverse_kl", "forward_kl")}
    s, t = logits()
    leaf, x = s.double().requires_grad_(), s.clone().requires_grad_()
    counts = IDS != -100
    truth = oracle.statistics(leaf, t if teacher else None, IDS.clamp(min=0), 0.7, None)
    wanted = sum((torch.where(counts, truth[k], 0) * c).sum() for k, c in given.items())
    loss, stats = distill_loss(x * 1.0, t if teacher else None, IDS, temperature=0.7, inplace=inplace, **given)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    torch.testing.assert_close(oracle.gradient(loss, x).double(), oracle.gradient(wanted, leaf), rtol=1e-5, atol=1e-6)
    read = torch.stack([torch.as_tensor(c).expand(2, 3) != 0 for c in given.values()]).any(0) & counts
    for k in given:
        found, expected = getattr(stats, k).double(), torch.where(read, truth[k], 0)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not any(x.requires_grad for x in stats)


def test_rows_that_do_not_count_are_not_read(backend):
    s, t = logits()
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    read = (IDS != -100) & (weights != 0)
    s[~read], t[~read] = torch.nan, torch.nan
    s.requires_grad_()
    loss, stats = distill_loss(s, t, IDS, reverse_kl=weights, student_logprobs=-weights)
    loss.backward()
    assert loss.isfinite() and (s.grad[~read] == 0).all() and (s.grad[read] != 0).all()
    assert all((x[~read] == 0).all() for x in stats)


def test_without_token_ids_every_row_counts(backend):
    s, t = logits()
    torch.testing.assert_close(distill_loss(s, t, reverse_kl=1 / 6).loss, fused_rkl_loss(s, t))
    assert distill_loss(s[:, :0], t[:, :0], reverse_kl=1.0).loss == 0
    torch.testing.assert_close(distill_loss(s[0, 0], t[0, 0], reverse_kl=1.0).loss, fused_rkl_loss(s[0, 0], t[0, 0]))


def test_a_statistic_that_nobody_asked_for_may_be_infinite(backend):
    s, t = logits()
    s[..., 5] = -torch.inf  # the token of the first row
    s.requires_grad_()
    loss, stats = distill_loss(s, t, IDS, forward_kl=1.0)
    loss.backward()
    assert stats.student_logprobs[0, 0] == -torch.inf
    assert loss.isfinite() and s.grad.isfinite().all()


def test_float64():
    s, t = logits(torch.float64)
    assert distill_loss(s, t, IDS, reverse_kl=1.0).loss.dtype == torch.float64


def test_what_a_loss_is_made_of():
    s, t = logits()
    for options, message in (
        ({}, "every coefficient is 0: there is no loss; pass one of reverse_kl, forward_kl"),
        ({"student_logprobs": -1.0}, "student_logprobs needs token_ids"),
        ({"reverse_kl": torch.ones(4)}, "reverse_kl must broadcast to the leading shape"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_loss(s, t, **options)
    with pytest.raises(ValueError, match="forward_kl needs a teacher: pass the teacher's logits"):
        distill_loss(s, None, IDS, forward_kl=1.0)
    with pytest.raises(ValueError, match="inplace=True cannot write"):
        distill_loss(s[:, :1].expand(2, 3, 257), t, reverse_kl=1.0, inplace=True)


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("name", ["stats_loss", "reverse_kl", "jsd"])
def test_opcheck(name, needed):
    s, t = torch.randn(3, 60, requires_grad=True), torch.randn(3, 60)
    settings = (False, needed, 0.7, 60, "reference")
    if name == "stats_loss":
        weights = (None, torch.rand(3), -torch.tensor([1.0, 0.0, 2.0]), None, None)
        args = (s, t, torch.tensor([5, 7, -100]), *weights, [0.5, 0.0, 0.0, 0.0, 0.1], -100, *settings)
    else:
        args = (s, t, torch.tensor([1.0, 0.0, 2.0]), None, None, "mean", name, 0.3, *settings)
    operator = torch.ops.minillm.stats_loss if name == "stats_loss" else torch.ops.minillm.divergence_loss
    torch.library.opcheck(operator.default, args)
