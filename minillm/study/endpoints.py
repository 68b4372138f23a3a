"""What a study measures of each method, and the differences between two of them.

Legend: S seeds, P prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from minillm.evaluation.result import OWN, Evaluation
from minillm.study.choice import read
from minillm.study.judgement import Difference, Table, bootstrap, over_seeds
from minillm.study.plan import ROUGE, Cell, Study

FORWARD = "forward_kl/teacher_samples"
Record = dict[str, Any]
"""What cell.py writes, its evaluations as `Evaluation`."""
Records = Mapping[Cell, Record]


class Endpoint(NamedTuple):
    """One number of a model, from its record; NaN where it was not measured."""

    title: str
    value: Callable[[Record], float]
    digits: int
    better: int
    """+1: higher is better, -1: lower, 0: neither."""
    per_prompt: Callable[[Record], tuple[torch.Tensor, torch.Tensor]] | None = None
    """[P] totals and counts, where the number is their quotient."""

    def text(self, records: Sequence[Record]) -> str:
        """Mean over the seeds ± their standard deviation."""
        values = [value for value in map(self.value, records) if not math.isnan(value)]
        if not values:
            return ""
        return f"{fmean(values):.{self.digits}f}" + (f" ± {stdev(values):.{self.digits}f}" if len(values) > 1 else "")


def load_records(study: Study) -> dict[Cell, Record]:
    """What the cells that are done have written, by cell."""
    records = {}
    for cell in study.cells():
        if study.result(cell).exists():
            record = read(study, cell)
            found = {name: Evaluation.from_dict(tree) for name, tree in record.get("evaluations", {}).items()}
            lengths = {name: tree["reference_lengths"] for name, tree in record.get("evaluations", {}).items()}
            records[cell] = record | {"evaluations": found, "reference_lengths": lengths}
    return records


def of(records: Records, name: str) -> dict[int, Record]:
    """The evaluated records of a method, by seed."""
    return {c.seed: r for c, r in records.items() if c.name == name and not c.candidate and r["evaluations"]}


def find(record: Record, key: str) -> Evaluation | None:
    """The first evaluation that has this mean."""
    return next((found for found in record["evaluations"].values() if key in found.means), None)


def endpoints(records: Records) -> dict[str, Endpoint]:
    """The primary one first; ExAccErr at the longest response that every curve reaches."""
    curves = [
        found.exposure_bias
        for record in records.values()
        for found in record["evaluations"].values()
        if found.exposure_bias
    ]
    longest = min((len(curve.length) for curve in curves), default=0)

    def exposure(record: Record) -> float:
        found = [e.exposure_bias for e in record["evaluations"].values() if e.exposure_bias]
        return found[0].exaccerr[longest - 1] if found and longest else math.nan

    def first(read: Callable[[Evaluation], float]) -> Callable[[Record], float]:
        return lambda record: read(find(record, ROUGE)) if find(record, ROUGE) else math.nan  # type: ignore[arg-type]

    def lengths(record: Record) -> tuple[torch.Tensor, torch.Tensor]:
        means = find(record, OWN).means  # type: ignore[union-attr]
        return means[OWN].counts, means[ROUGE].counts

    return {
        "rouge": _mean("ROUGE-L", ROUGE, 2, 1),
        "rkl": _mean("reverse KL, own text", OWN, 3, -1),
        "fkl": _mean("forward KL, teacher's text", FORWARD, 3, -1),
        "length": Endpoint("length", first(lambda e: e.length["sampled"].mean), 1, 0, lengths),
        "distinct": Endpoint("distinct-4, %", first(lambda e: e.distinct["4"].mean), 1, 0),
        "ece": Endpoint(
            "ECE, next token",
            first(lambda e: e.calibration["next_token"].ece if e.calibration else math.nan),
            3,
            -1,
        ),
        "exposure": Endpoint(f"prompt-weighted ExAccErr({longest}), %", exposure, 1, -1),
    }


def difference(endpoint: Endpoint, ours: Mapping[int, Record], rival: Mapping[int, Record]) -> Difference | None:
    """Over the seeds that both have; None where there is none, or nothing was measured."""
    seeds = [s for s in ours if s in rival and not math.isnan(endpoint.value(ours[s]) - endpoint.value(rival[s]))]
    if not seeds:
        return None
    if endpoint.per_prompt is None:
        return over_seeds([endpoint.value(ours[s]) - endpoint.value(rival[s]) for s in seeds])
    per_prompt = endpoint.per_prompt

    def table(records: Mapping[int, Record]) -> Table:
        columns = zip(*(per_prompt(records[s]) for s in seeds), strict=True)
        return Table(*(torch.stack(column) for column in columns))

    return bootstrap(table(ours), table(rival))


def _mean(title: str, key: str, digits: int, better: int) -> Endpoint:
    def value(record: Record) -> float:
        found = find(record, key)
        return found.means[key].mean if found else math.nan

    def per_prompt(record: Record) -> tuple[torch.Tensor, torch.Tensor]:
        mean = find(record, key).means[key]  # type: ignore[union-attr]
        return mean.totals, mean.counts

    return Endpoint(title, value, digits, better, per_prompt)
