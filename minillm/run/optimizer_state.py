"""The state of an optimiser as plain tensors by name, and back: of any optimiser of torch's interface.

A tensor subclass, such as quantised moments, is the plain tensors that it is made of; shards are left as they are; a
number is a tensor of one element. The structure is not stored: a step on fresh weights makes it, and the stored
numbers fill it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minillm.parallel.whole import copy_into, is_shard
from minillm.run.verify import check_alike

GROUP_STEP = "step"  # kept by some for all parameters together


def plain_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`NAME.KEY` of each parameter's state, `NAME.KEY.PART` of tensor subclasses, and `step` where a group counts."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found |= _plain(f"{name}.{key}", value)
    seen: set[int] = set()
    for name, value in found.items():  # a table that all parameters share is stored with each, as files want it
        if not is_shard(value):
            found[name] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    step = optimizer.param_groups[0].get(GROUP_STEP)
    return found if step is None else found | _plain(GROUP_STEP, step)


@torch.no_grad()
def fill_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Tensor]) -> None:
    """Put back what `plain_state` gave into an optimiser that has made no step; what is stored without values is left
    at some. The weights are changed: restore them afterwards.

    Raises CheckpointError for a state that is not of this optimiser and these parameters.
    """
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for name, parameter in parameters.items():
        if not any(part.startswith(f"{name}.") for part in stored):
            del optimizer.state[parameter]  # it never had a gradient
    check_alike(stored, plain_state(optimizer, parameters))
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            state[key] = _filled(f"{name}.{key}", value, stored)
    if GROUP_STEP in stored:
        for group in optimizer.param_groups:
            group[GROUP_STEP] = _filled(GROUP_STEP, group[GROUP_STEP], stored)


def _plain(name: str, value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Tensor):
        return {name: torch.tensor(value)}
    if is_shard(value) or not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    parts: dict[str, Tensor] = {}
    for part in value.__tensor_flatten__()[0]:
        parts |= _plain(f"{name}.{part}", getattr(value, part))
    return parts


def _filled(name: str, value: Any, stored: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return type(value)(stored[name].item())
    for part, tensor in _plain(name, value).items():
        if not stored[part].is_meta:
            copy_into(tensor, stored[part])
    return value
