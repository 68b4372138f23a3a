"""inplace=True: a gradient over the logits, where it overwrites nothing that is read after it."""

import pytest
import torch

from minillm_kernels import distill_loss, fused_divergence_loss, fused_rkl_loss, minillm_loss
from minillm_kernels.rows import rows_overlap, share_memory

ZERO = torch.zeros(())


def _minillm(s, t, **options):
    ids = torch.zeros(s.shape[:-1], dtype=torch.int64)
    return minillm_loss(s, t, ids, advantages=ZERO, old_logprobs=ZERO, **options).loss


LOSSES = {
    "fused_rkl_loss": fused_rkl_loss,
    "fused_divergence_loss": lambda s, t, **options: fused_divergence_loss(s, t, "jsd", **options),
    "distill_loss": lambda s, t, **options: distill_loss(s, t, forward_kl=1.0, **options).loss,
    "minillm_loss": _minillm,
}
OVERLAPPING = {
    "expanded": lambda x: x[:60].expand(6, 60),
    "unfolded": lambda x: x.unfold(0, 60, 59),
    "two-strides": lambda x: x.as_strided((2, 3, 60), (60, 60, 1)),
    "interleaved": lambda x: x.as_strided((3, 2, 60), (90, 100, 1)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("rows", OVERLAPPING.values(), ids=OVERLAPPING)
def test_rows_that_share_memory_cannot_be_overwritten(loss, rows):
    x = torch.randn(600, requires_grad=True)
    s = rows(x * 1)
    t = torch.randn(s.shape)
    loss(s, t).backward()
    with pytest.raises(ValueError, match="inplace=True cannot write a gradient over student_logits of strides"):
        loss(rows(x * 1), t, inplace=True)


# A pair of one tensor [7, 130], 16 bits or 32: they share memory, or lie between each other.
SHARED = {
    "the-same": lambda z: (z[1:, :60], z[1:, :60]),
    "other-rows": lambda z: (z[1:, :60], z[:-1, :60]),
    "columns-shifted": lambda z: (z[:6, :60], z[:6, 59:119]),
    "one-row": lambda z: (z[:6, :60], z[5:6, 1:61].expand(6, 60)),
    "another-type": lambda z: (z[:6, :60], z.view(torch.bfloat16)[:6, 118:178]),
}
APART = {
    "halves": lambda z: (z[:3, :60], z[3:6, :60]),
    "beside-each-other": lambda z: (z[:6, :60], z[:6, 60:120]),
    "alternating": lambda z: (z[:6:2, :60], z[1:7:2, :60]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_logits_that_share_memory_with_the_teacher_cannot_be_overwritten(loss):
    x = torch.randn(7, 130, requires_grad=True)
    for pair in SHARED.values():
        s, t = pair(x * 1)
        loss(s, t.detach()).backward()
        s, t = pair(x * 1)
        with pytest.raises(
            ValueError, match=r"share memory with teacher_logits: pass teacher_logits.clone\(\), or inpl"
        ):
            loss(s, t.detach(), inplace=True)
    for case, pair in APART.items():
        gradients = []
        for inplace in (False, True):
            s, t = pair(x * 1)
            gradients += torch.autograd.grad(loss(s, t.detach(), inplace=inplace), x)
        assert torch.equal(*gradients), case


def test_logits_that_share_memory_with_constants_cannot_be_overwritten():
    x = torch.randn(4, 60, requires_grad=True)
    ids = torch.zeros(4, dtype=torch.int64)
    calls = {
        "weights": lambda s, c: fused_rkl_loss(s, s.detach().clone(), weights=c, inplace=True),
        "labels": lambda s, c: fused_rkl_loss(s, s.detach().clone(), c.view(torch.int32), inplace=True),
        "reverse_kl": lambda s, c: distill_loss(s, s.detach().clone(), reverse_kl=c, inplace=True),
        "advantages": lambda s, c: minillm_loss(
            s, s.detach().clone(), ids, advantages=c, old_logprobs=ZERO, inplace=True
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"share memory with {name}: pass {name}.clone"):
            s = x * 1
            call(s, s.detach()[:, 7])


def test_compiled_code_is_refused_too():
    torch.compiler.reset()
    step = torch.compile(lambda s, t: fused_rkl_loss(s, t, inplace=True), fullgraph=True, backend="aot_eager")
    z = torch.randn(7, 60)
    with pytest.raises(ValueError, match="share memory with teacher_logits"):
        step(z[1:], z[:-1])
    with pytest.raises(ValueError, match="several rows share one memory"):
        step(torch.randn(600).unfold(0, 60, 59), torch.randn(10, 60))
    torch.compiler.reset()


def test_overlap_is_what_the_bytes_say():
    """Random strides, starts and types in one small buffer."""
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    buffer, seen = torch.zeros(200, dtype=torch.float32), {True: 0, False: 0}
    for _ in range(400):
        views, bytes_of = [], []
        for _ in range(2):
            x = buffer.view((torch.float32, torch.bfloat16)[draw(0, 2)])
            size = (draw(1, 4), draw(1, 4), draw(1, 9))
            x = x.as_strided(size, (draw(0, 30), draw(0, 12), 1), draw(0, 60))
            rows = [x[i, j].data_ptr() for i in range(size[0]) for j in range(size[1])]
            views.append(x)
            bytes_of.append([set(range(r, r + size[2] * x.element_size())) for r in rows])
        shared = not set().union(*bytes_of[0]).isdisjoint(set().union(*bytes_of[1]))
        assert share_memory(*views) == shared
        seen[shared] += 1
        if len(set().union(*bytes_of[0])) < sum(map(len, bytes_of[0])):
            assert rows_overlap(views[0])
    assert min(seen.values()) > 50
