"""The paper's buckets of prompts by the length of their reference answer: at most 5 tokens, 6 to 10, 11 and more."""

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.evaluate.means import Estimate

BUCKETS = {"<=5": (0, 5), "6-10": (6, 10), ">=11": (11, None)}


def bucket(length: int) -> str:
    """Name of the bucket of a reference of `length` tokens, end-of-sequence not counted."""
    return next(name for name, (_, last) in BUCKETS.items() if last is None or length <= last)


def by_length(lengths: Sequence[int], estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Each estimate over the prompts of each bucket alone; an empty bucket has 0 prompts and nothing else."""
    names = [bucket(length) for length in lengths]
    result: dict[str, dict[str, Any]] = {}
    for name in BUCKETS:
        rows = [i for i, found in enumerate(names) if found == name]
        parts = {key: Estimate(e.totals[rows], e.counts[rows]).to_dict() for key, e in estimates.items() if rows}
        result[name] = {"prompts": len(rows), **parts}
    return result
