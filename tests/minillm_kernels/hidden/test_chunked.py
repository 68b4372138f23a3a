"""The chunk driver: what it holds on to."""

from weakref import ref

import pytest
import torch
from linear_cases import Case, N, V
from torch import Tensor

import minillm_kernels as mk
from minillm_kernels.hidden import chunked


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "none", "minillm"])
def test_the_logits_of_a_chunk_are_gone_before_those_of_the_next(monkeypatch, loss):
    """Where the matmul takes memory of its own, as fp32 on a CPU does: a name that holds on to them doubles it."""
    case, made = Case(torch.float32), []
    linear = chunked.linear

    def watched(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        if out is not None:
            assert sum(z() is not None for z in made) < 2  # the student's of this chunk
        z = linear(x, weight)
        made.append(ref(z.untyped_storage()))
        return z

    monkeypatch.setattr(chunked, "linear", watched)
    models = case.models(case.leaves(), None)
    if loss == "minillm":
        constants = dict.fromkeys(("advantages", "old_logprobs"), torch.zeros(N))
        value = mk.fused_linear_minillm_loss(*models, case.labels.clamp(max=V - 1), **constants, chunk_rows=5).loss
    else:
        name, reduction = ("jsd", "none") if loss == "none" else (loss, "sum")
        value = mk.fused_linear_divergence_loss(*models, name, case.labels, reduction=reduction, chunk_rows=5).sum()
    value.backward()
    assert len(made) > 6
