"""Which processes hold the columns of a vocabulary, and what this one holds.

Legend: V vocabulary, H hidden, P ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import add

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks(NamedTuple):
    """The processes that share a vocabulary, each with the columns that follow those of the rank before."""

    group: ProcessGroup
    widths: tuple[int, ...] | None
    """[P] how many columns each of them has, where DTensors say so."""


def ranks_of(group: object, *held: tuple[Tensor, int]) -> Ranks | None:
    """The ranks that hold these tensors, each given with its vocabulary's dimension: those of `group`, or of the mesh
    that a DTensor among them lies on; None where every tensor is whole.

    Raises TypeError or ValueError for a group, a mesh or a placement that says no such thing, the same on all ranks.
    """
    if isinstance(group, Ranks):
        return group
    sharded: list[tuple[Any, int]] = [(x, dim) for x, dim in held if is_dtensor(x)]
    if group is None and not sharded:
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "a vocabulary split over ranks (group=) communicates and cannot be part of a compiled graph: call it "
            "outside of what torch.compile compiles, or without fullgraph=True"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group that this process belongs to, whose ranks hold the "
            f"slices of the vocabulary, got {group!r}"
        )
    widths = {_widths(x, dim) for x, dim in sharded}
    groups = [x.device_mesh.get_group() for x, _ in sharded] + ([] if group is None else [group])
    if len({tuple(dist.get_process_group_ranks(g)) for g in groups}) > 1:
        raise ValueError("the heads and group= name different processes: split both vocabularies over the same ones")
    if len(widths) > 1:
        raise different_splits(*sorted(widths))
    whole = len(sharded) == len(held)
    return Ranks(groups[-1], widths.pop() if whole else None)


def is_dtensor(x: Tensor | None) -> bool:
    return type(x) is not Tensor and hasattr(x, "device_mesh")  # its module takes more than a second to import


def local(x: Any) -> Any:
    """What this rank holds of a DTensor, whose gradient is one again; any other tensor, or None, itself."""
    return x.to_local() if is_dtensor(x) else x


def replicated(x: Tensor, ranks: Ranks) -> Tensor:
    """Hidden states that every rank has whole. Their gradient is the sum of what the columns of each rank give."""
    return _Replicated.apply(x, ranks.group)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        return add(total, ctx.group).to(grad.dtype), None


def different_splits(student: tuple[int, ...], teacher: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"the vocabularies of student and teacher are split differently: the ranks hold {student} and {teacher} "
        "columns, but a rank needs the same columns of both; cut the teacher's by the student's split, once at load "
        "(torch.distributed.tensor.distribute_tensor(weight[:V], mesh, [Shard(0)]) with the student's V)"
    )


def _widths(x: Any, dim: int) -> tuple[int, ...]:
    """Of a DTensor, which is cut as torch.chunk cuts."""
    if x.device_mesh.ndim != 1 or not x.placements[0].is_shard(dim % x.ndim):
        raise ValueError(
            f"a DTensor must be Shard({dim % x.ndim}), its vocabulary, on a mesh of one dimension, got "
            f"{x.placements} on {x.device_mesh}: take the mesh of the tensor-parallel dimension alone, or pass "
            "full_tensor() where the vocabulary is not split"
        )
    size, V = x.device_mesh.size(), x.shape[dim]
    step = -(-V // size)
    return tuple(min(max(V - rank * step, 0), step) for rank in range(size))
