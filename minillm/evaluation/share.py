"""The batches of an evaluation, shared by the processes of a run."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_batches(work: Callable[[int, Sequence[Item]], Result], items: Sequence[Item], size: int) -> list[Result]:
    """What `work` makes of each batch of `size` items, in their order; every process does a share and knows all.

    Whole batches are shared, as one process would make them, so that no number depends on how many there are. `work`
    gets the number of the batch's first item, and the batch. What it returns lives on the CPU.
    """
    state = PartialState()
    starts = range(0, len(items), size)[state.process_index :: state.num_processes]
    mine: list[Any] = [(start, work(start, items[start : start + size])) for start in starts]
    if state.num_processes > 1:
        mine = sorted(gather_object(mine), key=lambda found: found[0])
    return [result for _, result in mine]
