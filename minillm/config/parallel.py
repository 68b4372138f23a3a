"""The section `parallel`: where the models live, over the processes of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    """Nothing here changes what is learnt: a run may be resumed with other values."""

    student: str = "replicate"
    """`replicate`: whole on every process, with its gradient and optimiser state; `shard`: each process holds a part
    of all three (FSDP2), and the student is gathered in its compute dtype for rollouts and evaluations."""
    teacher: str = "replicate"
    """`replicate`; `shard`: each process holds a part of each layer, and layers are gathered as they run, or once for
    a rollout that mixes the teacher in; `offload`: the same parts, in the CPU's memory between uses; `tensor`: the
    processes of a host compute each layer together (tensor parallelism of transformers), and hold a part of the head
    each, for teachers that fit no device and are mixed into rollouts."""
    hosts: int = 1
    """Hosts of the run: what is in parts is so over the processes of a host, and hosts hold copies."""
