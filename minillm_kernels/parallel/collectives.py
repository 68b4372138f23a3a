"""What ranks tell each other: every collective of the package is here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """[P, ...] of x [...] of each rank, in rank order: whoever adds them up adds in one order, to the same bits."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
    return out


def add(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of x over the ranks, in its memory."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x
