"""What the training loop asks of a student, whole on every process (DDP) or in shards."""

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from minillm.model.head import CausalLM
from minillm.parallel.shard import is_sharded


def to_step(lm: CausalLM) -> list[nn.Parameter]:
    """The parameters that an optimiser is made of. Of a sharded student all are shards: gathered weights are
    temporary, and steps on them would be lost."""
    parameters = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    if is_sharded(lm):
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in parameters), "an optimiser of a gathered student"
    return parameters


def prepare(lm: CausalLM, optimizer: Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """What is called in the student's place, and the optimiser."""
    if is_sharded(lm):
        return lm, accelerator.prepare(optimizer)
    return accelerator.prepare(lm, optimizer)


def averaged_over(predictor: nn.Module, accelerator: Accelerator) -> int:
    """The number of processes by which gradients are divided when they are reduced."""
    return accelerator.num_processes if isinstance(predictor, nn.parallel.DistributedDataParallel) else 1
