"""row_scale: a gradient that was formed with the loss, times what arrives for the loss. That number is on the device,
where the host cannot look without waiting; it is 1 in most training loops, and then no program does more than read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowmath as rm
from .launch import per_row

BLOCK: tl.constexpr = tl.constexpr(4096)
WARPS = 8


@triton.jit
def row_scale_kernel(x, factor, n):
    f = tl.load(factor)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.where(f == 0.0, 0.0, tl.load(x + at, at < n, other=0.0).to(tl.float32) * f)
        tl.store(x + at, rm.rounded(scaled, x.dtype.element_ty), at < n)


def row_scale(x: Tensor, factor: Tensor) -> None:
    n = x.numel()
    if n > 0:
        row_scale_kernel[(triton.cdiv(n, BLOCK.value),)](x, per_row(factor, torch.float32), n, num_warps=WARPS)
