"""Log-probability of a token and the entropy of its row, forward: one read of one tensor."""

from __future__ import annotations

import pytest
import torch
from measuring import logits

from minillm_kernels import token_logprobs, use_backend

SHAPES = [((256, 50257), torch.float32), ((192, 151936), torch.bfloat16)]
IDS = ["fp32-256x50257", "bf16-192x151936"]


def eager(z, token_ids):
    log_q = z.float().log_softmax(-1)
    return log_q.gather(-1, token_ids[:, None]).squeeze(-1), -(log_q.exp() * log_q).sum(-1)


def ours(z, token_ids):
    with use_backend("cpu"):
        return token_logprobs(z, token_ids, return_entropy=True)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=IDS)
@pytest.mark.parametrize("row", ["minillm", "eager", "torch.compile"])
def test_forward(measure, row, shape, dtype):
    z = logits(shape, dtype, 0)
    token_ids = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(2))
    fn = {"minillm": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}[row]
    truth = eager(z.double().float(), token_ids)
    error = max(float((a - b).abs().max()) for a, b in zip(fn(z, token_ids), truth, strict=True))
    assert error < 1e-4
    measure(f"token_logprobs+entropy forward {IDS[SHAPES.index((shape, dtype))]}", shape, dtype)(
        lambda: fn(z, token_ids), tensors=1, implementation=row, error=error
    )
