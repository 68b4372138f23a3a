"""Whole weights on every process, for a while.

Outside, a layer is gathered for each of its forward passes, which all processes must make equally often. Rollouts and
evaluations do not: responses end where they end. Inside, nothing communicates.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from minillm.model.head import CausalLM
from minillm.parallel.shard import groups_of


@contextmanager
def gathered(*models: CausalLM | None) -> Iterator[None]:
    """Inside, the parameters of sharded models are plain tensors, in the dtype that the models compute in; models that
    are whole are left alone. Every process must enter. An optimiser must not be made inside."""
    sharded = [lm for lm in models if lm is not None and groups_of(lm)]
    groups = [group for lm in sharded for group in groups_of(lm)]
    for lm in sharded:
        lm.enter()
    for handle in [group.unshard(async_op=True) for group in groups]:
        if handle is not None:
            handle.wait()
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.set_reshard_after_backward(False, recurse=False)  # of a gradient that nobody steps by
        group.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group not in sharded, recurse=False)
            group.set_reshard_after_backward(True, recurse=False)
            group.set_requires_gradient_sync(True, recurse=False)
            group.reshard()
