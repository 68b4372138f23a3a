"""Sharded tensors and models put together again, on the CPU of the first process."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole(tensor: Tensor) -> Tensor:
    """The tensor that these are shards of, on every process; one that is whole as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def is_shard(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def whole_on_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of the first process, one gathered after the other; the others get none. Every process must
    call it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if _first():
            found[name] = value.cpu()
    return found


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be a shard, whose part of it is taken. Nothing communicates."""
    if is_shard(target):
        from torch.distributed.tensor import distribute_tensor

        device, mesh, placements = local(target).device, target.device_mesh, target.placements  # type: ignore[attr-defined]
        part = distribute_tensor(source.to(device), mesh, placements, src_data_rank=None)
        target, source = local(target), part.to_local()
    target.copy_(source)


def keep_skeleton(lm: CausalLM) -> None:
    """Keep a copy of the model without its weights: one that is sharded cannot be copied."""
    without: dict[int, Any] = {id(x): nn.Parameter(x.to("meta"), x.requires_grad) for x in lm.model.parameters()}
    without[id(lm.model.config)] = lm.model.config
    skeleton = copy.deepcopy(lm.model, without)

    def fill(weights: Mapping[str, Tensor]) -> "PreTrainedModel":
        filled = {id(x): nn.Parameter(weights[name], x.requires_grad) for name, x in skeleton.named_parameters()}
        return copy.deepcopy(skeleton, filled)

    lm.copy_with = fill


def whole_model(lm: CausalLM) -> "PreTrainedModel | None":
    """The model as it is saved: itself where it is whole, else on the first process a copy on the CPU, None on the
    others. Every process must call it."""
    if lm.copy_with is None:
        return lm.model
    weights = whole_on_first(dict(lm.model.named_parameters()))
    return lm.copy_with(weights) if _first() else None


def _first() -> bool:
    return PartialState().is_main_process
