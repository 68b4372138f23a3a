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
from minillm.config.schema import RunConfig
from minillm.model.head import CausalLM
from minillm.model.layers import layers_of
from minillm.model.load import own_tensors, unread_model
from minillm.parallel.mesh import check_torch, sharding_mesh
from minillm.parallel.tensor import split_teacher, splits_teacher
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

    cuda, outside = mesh.device_type == "cuda", _outside(lm)
    for tensor in (*outside, *lm.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(PartialState().device)
    policy = CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()
    _fully_shard(lm, mesh, ignored_params=outside, offload_policy=policy)


def place_student(lm: CausalLM, parallel: ParallelConfig, compute_dtype: torch.dtype) -> None:
    """Shard the student where `parallel.student` says so, and there are several processes. Every process must call
    it."""
    if parallel.student == "shard" and PartialState().num_processes > 1:
        shard_student(lm, sharding_mesh(parallel), compute_dtype)


def place_teacher(lm: CausalLM, parallel: ParallelConfig) -> None:
    """The same of the teacher, which may be split, too; one process offloads."""
    _give_parts(lm, parallel)
    lm.enter()  # or of shards the first layer that runs would be the root


def _give_parts(lm: CausalLM, parallel: ParallelConfig) -> None:
    if splits_teacher(parallel):
        split_teacher(lm, parallel)
    elif shards_teacher(parallel):
        shard_teacher(lm, sharding_mesh(parallel), parallel.teacher == "offload")


def shards_teacher(parallel: ParallelConfig) -> bool:
    return parallel.teacher == "offload" or (parallel.teacher == "shard" and PartialState().num_processes > 1)


@torch.no_grad()
def read_teacher(run: RunConfig) -> CausalLM | None:
    """The teacher read into its parts, so that no process ever holds it whole; None where it has none, or its files do
    not hold it by its own names (`unread_model`). Every process must call it."""
    if not (shards_teacher(run.parallel) or splits_teacher(run.parallel)):
        return None
    check_torch()
    offload = run.parallel.teacher == "offload"
    found = unread_model(run.model.teacher, run.teacher.dtype, run.model.attn)
    if found is None:
        return None
    import torch.distributed.checkpoint as dcp

    model, folder = found
    lm, device = CausalLM(model.requires_grad_(False), run.model.head, tried=False), PartialState().device
    names, buffers = own_tensors(model), {name: x.clone() for name, x in model.named_buffers()}
    _give_parts(lm, run.parallel)
    lm.to_empty(device="cpu" if offload else device)
    model.tie_weights()
    tensors = model.state_dict(keep_vars=True)
    dcp.load(
        {name: tensors[name].detach() for name in names},
        storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
    )
    for name, buffer in model.named_buffers():
        if name not in names:  # made from the configuration
            buffer.copy_(buffers[name])
    for tensor in (*_outside(lm), *lm.buffers()):
        tensor.data = tensor.data.to(device)
    lm.enter()
    lm.check()
    return lm


def _outside(lm: CausalLM) -> set[nn.Parameter]:
    """The parameters outside its layers."""
    inside = {id(parameter) for parameter in layers_of(lm.model)[1].parameters()}
    return {parameter for parameter in lm.parameters() if id(parameter) not in inside}


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


def groups_of(lm: object) -> "list[Any]":
    """Its modules whose weights are gathered together; none where it is whole, or elsewhere."""
    if not torch.distributed.is_available() or not isinstance(lm, nn.Module):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in lm.modules() if isinstance(module, FSDPModule)]


def is_sharded(lm: object) -> bool:
    return bool(groups_of(lm))
