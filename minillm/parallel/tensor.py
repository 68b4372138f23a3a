"""A teacher whose layers the processes of a host compute together: the tensor parallelism of transformers.

Each process holds a part of every layer, and all of a host must run the same tokens; hosts hold copies. So the
processes of a host sample together, each of them every response of the host's share; and where each has a batch of
its own, all run all batches, one after the other. What a layer gives is the same to the last bit on each of them,
since its parts are added once and then handed out.

The head is split as well, and stays so: the losses are those of the rows of all these processes at once (`joined`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError
from minillm.data.examples import Batch, PolicyConstants
from minillm.model.head import CausalLM, Output, Scorer, Sums
from minillm.model.split import rows_here, shares_heads
from minillm.parallel.mesh import processes_of_a_host
from minillm_kernels.parallel.collectives import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loss = Callable[[Output, Batch], Sums]
"""Sums over the targets of a batch, from the student's output on it."""
HOST, PROCESS = "host", "tp"
"""Dimensions of the mesh: a copy of the teacher, and a part of it."""


def splits_teacher(parallel: ParallelConfig) -> bool:
    return parallel.teacher == "tensor" and processes_of_a_host(parallel) > 1


def split_teacher(lm: CausalLM, parallel: ParallelConfig) -> None:
    """Give each process its part of a frozen teacher, in place, by the plan that transformers has for its family.

    Raises ConfigError where transformers is too old, or has no plan for it, or its heads cannot be shared out.
    """
    processes, model = processes_of_a_host(parallel), lm.model
    if not shares_heads(model, processes):
        raise ConfigError(
            f"parallel.teacher is tensor, and the {processes} processes of a host cannot share the heads of the "
            f"attention of {type(model).__name__} equally (num_attention_heads, num_key_value_heads in its "
            "config.json): start as many as divide both, or set parallel.teacher to shard"
        )
    mesh: Any = None
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.distributed import DistributedConfig
        from transformers.distributed.utils import TransformersDeviceMesh

        sizes, device = (parallel.hosts, 1, 1, 1, processes), PartialState().device.type
        dense, experts = ("pp", "dp_replicate", "fsdp", PROCESS), ("pp", "dp_replicate", "efsdp", "ep")
        mesh = init_device_mesh(device, sizes, mesh_dim_names=(HOST, *dense))
        unused = init_device_mesh(device, (*sizes[:3], processes, 1), mesh_dim_names=(HOST, *experts))
        plan = DistributedConfig(tp_size=processes, tp_plan="auto")
        _untie(model)
        type(model).maybe_distribute_model(model, plan, TransformersDeviceMesh(mesh[dense], unused[experts]))
        model.tie_weights()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"parallel.teacher tensor needs a newer transformers ({error}): upgrade it, or set it to shard"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"transformers cannot split {type(model).__name__} over processes ({error}): set parallel.teacher to shard"
        ) from error
    lm.split_over, lm.copies = mesh[PROCESS], mesh.get_group(HOST)


def _untie(model: nn.Module) -> None:
    """Let a weight that stands in two places be two parameters on one memory, each to be split by its own rule."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.data, parameter.requires_grad))
            seen.add(id(parameter))


def runs_together(lm: Scorer | None) -> bool:
    """Whether the processes of a host must run this model on the same tokens."""
    return getattr(lm, "split_over", None) is not None


def share_of_work(*models: Scorer | None) -> tuple[int, int]:
    """Which share of the work is this process's, and of how many: one of each process, or where processes compute
    one of these models together, one of each host."""
    state = PartialState()
    together = [lm.split_over.size() for lm in models if runs_together(lm)]  # type: ignore[union-attr]
    size = max(together, default=1)
    return state.process_index // size, state.num_processes // size


def joined(loss: Loss, teacher: Scorer | None, score: Callable[[Batch], Output]) -> Loss:
    """A loss of student and teacher, where the teacher's head is split: over the rows of all processes that hold a
    part of it, and on each of them with its own part of both heads.

    Every process must call it equally often. Each counts an equal share of the sums, which is over all processes what
    each one's own rows would give; and has the gradient of its own rows' states, and of its part of the student's
    head by all rows, which is over all processes the gradient of the head. `score` is what the teacher says of one
    batch, where a batch does not hold that already.
    """
    if not isinstance(teacher, CausalLM) or not runs_together(teacher):
        return loss
    group = teacher.split_over.get_group()  # type: ignore[union-attr]

    def of_all(student: Output, batch: Batch) -> Sums:
        device = student.states.device
        everyone = _told(batch._replace(teacher_states=None, asked=None).to(torch.device("cpu")), group)
        counts = [len(each.targets) for each in everyone]
        if batch.teacher_states is not None:
            states = torch.cat(_rows_of_all(batch.teacher_states, counts, group))
        else:
            states = torch.cat([score(each.to(device)).states for each in everyone])
        rows = _rows_of_all(student.states.detach(), counts, group)
        rows[torch.distributed.get_rank(group)] = student.states  # the only ones that are differentiated here
        policies = [each.policy for each in everyone if each.policy is not None]
        rest = batch._replace(
            targets=torch.cat([each.targets for each in everyone]),
            policy=PolicyConstants.concatenate(policies) if policies else None,
            teacher=None,
        )
        head = rows_here(student.head, teacher.head)
        sums = loss(Output(torch.cat(rows), head), rest.to(device)._replace(teacher_states=states))
        equal = 1 / len(everyone)
        shares = {name: value * equal for name, value in sums.items()}
        return shares | {"loss": sums["loss"] + (equal - 1) * sums["loss"].detach()}

    return of_all


def _told(item: Any, group: "ProcessGroup") -> list[Any]:
    """What each process of the group has."""
    found = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, item, group=group)
    return found


def _rows_of_all(x: Tensor, counts: list[int], group: "ProcessGroup") -> list[Tensor]:
    """[n, H] of each process of the group, of which each has another number."""
    padded = F.pad(x, (0, 0, 0, max(counts) - len(x)))
    return [each[:count] for each, count in zip(gather(padded, group), counts, strict=True)]
