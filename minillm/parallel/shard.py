"""FSDP2 of our own: each layer is a group, and the rest of the student with its loss is the root.

`CausalLM.forward` takes the loss along, so the head is a whole tensor where losses read it, and its gradient is
reduced with the rest. Whichever module runs first becomes the root: `enter`, which does nothing, is called first.

Gradients are summed over processes and not averaged: losses are divided by the global number of tokens beforehand.
"""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import nn

from minillm.config.parallel import ParallelConfig
from minillm.model.head import CausalLM
from minillm.model.layers import layers_of
from minillm.parallel.mesh import sharding_mesh
from minillm.parallel.whole import keep_skeleton

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_student(lm: CausalLM, mesh: "DeviceMesh", compute_dtype: torch.dtype) -> None:
    """Give each process its part of the student, in place. Weights and reduced gradients keep their dtype, float32 or
    above; the layers compute in `compute_dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    keep_skeleton(lm)
    policy: dict[str, Any] = {}
    if compute_dtype == torch.bfloat16:
        policy = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    _fully_shard(lm, mesh, mp_policy=MixedPrecisionPolicy(**policy))


def shard_teacher(lm: CausalLM, mesh: "DeviceMesh", offload: bool) -> None:
    """Give each process its part of the layers of a frozen teacher, in place; with `offload` in the memory of the CPU,
    pinned beside a GPU, from where they are copied while the layer before computes.

    What is outside the layers stays whole: embeddings are read where no layer has begun, and the head in the losses.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    cuda, layers = mesh.device_type == "cuda", layers_of(lm.model)[1]
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = {parameter for parameter in lm.parameters() if id(parameter) not in inside}
    for tensor in (*outside, *lm.buffers()):
        tensor.data = tensor.data.to(PartialState().device)
    policy = CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()
    _fully_shard(lm, mesh, ignored_params=outside, offload_policy=policy)


def place_student(lm: CausalLM, parallel: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard the student where `parallel.student` says so, and there are several processes. Every process must call
    it."""
    if parallel.student == "shard" and PartialState().num_processes > 1:
        shard_student(lm, sharding_mesh(parallel), compute_dtype)


def place_teacher(lm: CausalLM, parallel: ParallelConfig) -> None:
    """The same of the teacher; one process offloads, too."""
    offload = parallel.teacher == "offload"
    if offload or (parallel.teacher == "shard" and PartialState().num_processes > 1):
        shard_teacher(lm, sharding_mesh(parallel), offload)


def _fully_shard(
    lm: CausalLM, mesh: "DeviceMesh", ignored_params: set[nn.Parameter] | None = None, **policy: Any
) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in layers_of(lm.model)[1]:
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(lm, mesh=mesh, reshard_after_forward=False, ignored_params=ignored_params, **policy)
    for group in groups_of(lm):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(lm, "enter")
    lm.enter()
    groups_of(lm)[0].reshard()


def groups_of(lm: nn.Module) -> "list[Any]":
    """Its modules whose weights are gathered together; none where it is whole."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in lm.modules() if isinstance(module, FSDPModule)]


def is_sharded(lm: nn.Module) -> bool:
    return bool(groups_of(lm))
