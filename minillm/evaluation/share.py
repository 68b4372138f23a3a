"""The batches of an evaluation, shared by the processes of a run."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from minillm.model.head import Scorer
from minillm.parallel.tensor import share_of_work

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_batches(
    work: Callable[[int, Sequence[Item]], Result], items: Sequence[Item], size: int, *models: Scorer | None
) -> list[Result]:
    """What `work` makes of each batch of `size` items, in their order; every process does a share and knows all.

    Whole batches are shared, as one process would make them, so that no number depends on how many there are. `work`
    gets the number of the batch's first item, and the batch. What it returns lives on the CPU. Every process calls it
    equally often, for models that are sharded; what is done twice is used once. Processes that compute one of `models`
    together do their host's share together.
    """
    if PartialState().num_processes == 1:
        return [work(start, items[start : start + size]) for start in range(0, len(items), size)]
    starts, (share, shares) = range(0, len(items), size), share_of_work(*models)
    rounds = -(-len(starts) // shares)
    numbers = [(share + i * shares) % len(starts) for i in range(rounds)]
    mine: list[Any] = [(starts[i], work(starts[i], items[starts[i] : starts[i] + size])) for i in numbers]
    found = dict(reversed(gather_object(mine)))
    return [found[start] for start in starts]


def a_share(items: Sequence[Item], size: int) -> int:
    """The size of batches for work that itself does `size` items at once, and goes on with the next one when any is
    done: all that one process has."""
    return max(size, -(-len(items) // PartialState().num_processes))
