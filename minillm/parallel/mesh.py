"""The processes of a run as a mesh: rows are hosts, columns are the processes of a host."""

import os
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import distributed

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WRAPPERS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_DEEPSPEED")
"""Variables by which accelerate is told to shard; on a CPU it would pass them over without a word."""


def refuse_wrappers() -> None:
    """Raises ConfigError where accelerate was launched to shard the models: its wrapper takes the whole student as one
    group, and the head from under the losses."""
    for name in WRAPPERS:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise ConfigError(
                f"accelerate was launched to shard the models ({name}), which would be ignored or train something "
                "else here: launch without it (accelerate launch --num_processes N, or torchrun), and set "
                "parallel.student to shard"
            )


def processes_of_a_host(parallel: ParallelConfig) -> int:
    """Raises ConfigError where the processes are not the same number on each host."""
    processes = PartialState().num_processes
    if processes % parallel.hosts:
        raise ConfigError(
            f"parallel.hosts is {parallel.hosts}, which does not divide the {processes} processes of this run: every "
            "host must start the same number"
        )
    return processes // parallel.hosts


def sharding_mesh(parallel: ParallelConfig) -> "DeviceMesh":
    """[hosts, processes of a host] where there are several hosts, else [processes]; what is sharded is sharded over
    the last dimension.

    Raises ConfigError where this torch cannot shard.
    """
    from torch.distributed.device_mesh import init_device_mesh

    check_torch()
    columns, device = processes_of_a_host(parallel), PartialState().device.type
    if not distributed.is_initialized():  # one process, which offloads
        backend = "nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    if parallel.hosts == 1:
        return init_device_mesh(device, (columns,))
    return init_device_mesh(device, (parallel.hosts, columns), mesh_dim_names=("host", "process"))


def check_torch() -> None:
    """Raises ConfigError where torch lacks what sharding needs: sums of gradients that are not averaged first, and
    checkpoints of shards in safetensors."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # noqa: F401
        from torch.distributed.fsdp import FSDPModule

        FSDPModule.set_force_sum_reduction_for_comms  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"parallel.student and parallel.teacher need a newer torch than {torch.__version__} ({error}): upgrade "
            "it, or leave the section parallel out"
        ) from error
