"""What of a model several processes compute together: whether they can, and its vocabulary head.

The rows of a head lie on several processes, each with those that follow the ones before. The losses of
minillm_kernels take such heads as they are, DTensors: each process reads the same states and forms the logits of its
own rows, and what they tell each other is a few numbers a state. No process holds the head whole.

Legend: V vocabulary, H hidden, P processes, ... any states.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm_kernels import Head

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def shares_heads(model: "PreTrainedModel", processes: int) -> bool:
    """Whether each process can compute as many heads of a model's attention."""
    config = model.config.get_text_config()
    counts = [getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    return all(count % processes == 0 for count in counts if count is not None)


def split(head: Head, count: int, mesh: "DeviceMesh") -> Head:
    """The first `count` rows of a frozen head, over the processes of `mesh`; a head that lies so already, itself. One
    that lies otherwise is put together for a moment. Every process must call it."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    assert head.weight is not None
    if is_split(head) and len(head.weight) == count:
        return head

    def placed(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        whole = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()  # type: ignore[attr-defined]
        return distribute_tensor(whole[:count], mesh, [Shard(0)], src_data_rank=None)

    return replace(head, weight=placed(head.weight), bias=placed(head.bias))


def is_split(head: Head) -> bool:
    return hasattr(head.weight, "device_mesh")


def split_alike(states: Tensor, head: Head, other_states: Tensor, other: Head) -> tuple[Tensor, Head, Tensor, Head]:
    """Two models as losses take them: where one head is split, so is the other."""
    return states, rows_here(head, other), other_states, rows_here(other, head)


def rows_here(head: Head, other: Head) -> Head:
    """A head that every process holds whole, as its rows on this one, where `other` is split. Differentiable: the
    gradient of the head is then that of these rows alone, and the sum over processes is all of it."""
    if not is_split(other) or is_split(head):
        return head
    from torch.distributed.tensor import DTensor, Shard

    weight: Any = other.weight
    mesh, step = weight.device_mesh, -(-weight.shape[0] // weight.device_mesh.size())
    first = min(mesh.get_local_rank() * step, weight.shape[0])

    def here(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        mine, stride = x[first : first + len(weight.to_local())], (x.shape[1], 1) if x.dim() == 2 else (1,)
        return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=x.shape, stride=stride)

    return replace(head, weight=here(head.weight), bias=here(head.bias))


def split_logits(head: Head, states: Tensor) -> Tensor:
    """[..., V] on every process, of states [..., H] that all of them have: each forms those of its rows, and all are
    gathered. Without a gradient."""
    from torch.distributed.tensor import DTensor, Shard

    weight: Any = head.weight
    bias: Any = head.bias
    own = replace(head, weight=weight.to_local(), bias=None if bias is None else bias.to_local()).logits(states)
    rows, shape = own.flatten(0, -2), torch.Size((states[..., 0].numel(), weight.shape[0]))
    columns = DTensor.from_local(
        rows, weight.device_mesh, [Shard(1)], run_check=False, shape=shape, stride=(shape[1], 1)
    )
    return columns.full_tensor().view(*states.shape[:-1], -1)
