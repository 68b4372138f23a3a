"""A teacher whose layers several processes compute together: the tensor parallelism of transformers.

Each process holds a part of every layer, and all of them must run the same tokens. So they sample together, each of
them every response; and where each has a batch of its own, all run all batches, one after the other. What a layer
gives is the same to the last bit on each of them, since its parts are added once and then handed out.
"""

from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError
from minillm.data.examples import Batch
from minillm.model.head import CausalLM, Output
from minillm.model.load import Loader, load_model


def teacher_loader(parallel: ParallelConfig) -> Loader:
    """How the teacher is loaded. Raises ConfigError where transformers is too old for `parallel.teacher: tensor`."""
    processes = PartialState().num_processes
    if parallel.teacher != "tensor" or processes == 1:
        return load_model
    try:
        from transformers.distributed import DistributedConfig

        distributed: Any = DistributedConfig(tp_size=processes, tp_plan="auto")
    except (ImportError, TypeError) as error:
        raise ConfigError(
            f"parallel.teacher tensor needs a newer transformers ({error}): upgrade it, or set it to shard"
        ) from error
    return partial(load_model, distributed=distributed)


def runs_together(lm: CausalLM | None) -> bool:
    """Whether all processes must run this model on the same tokens."""
    return lm is not None and getattr(lm.model, "tp_size", None) not in (None, 1)


def output_of(lm: CausalLM, batch: Batch) -> Output:
    """The output on a batch that each process has of its own. Every process must call it."""
    if not runs_together(lm):
        return lm.output(batch)
    state = PartialState()
    everyone = gather_object([batch._replace(policy=None, teacher_states=None).to(torch.device("cpu"))])
    found = [lm.output(each.to(state.device)) for each in everyone]
    return found[state.process_index]
