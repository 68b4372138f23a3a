"""The study's page, docs/study.md: tables, figures and verdicts, from the JSON of the cells that are done.

Numbers are means over the training seeds ± their standard deviation. A claim is judged by the differences within a
seed and size, of one start and paired draws: it *holds* where the 95 % interval of their mean (Student's t) lies on
the side claimed, *fails* where it lies on the other, and is *open* otherwise. All sizes: the differences of all of
them taken together. The intervals are of training again on these prompts; other prompts would add their own spread.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml

from minillm.config.schema import ConfigError
from minillm.evaluation.result import Evaluation
from minillm.files import write_atomically
from minillm.report import figures
from minillm.study.plan import REFERENCE, START, TEACHER, Cell, Study

ALL = "all sizes"
Record = dict[str, Any]
"""What cell.py writes, its evaluations as `Evaluation`."""


class Metric(NamedTuple):
    title: str
    read: Callable[[Record], float]
    digits: int
    better: int
    """+1: higher is better, -1: lower, 0: neither."""


def metrics(study: Study, records: Mapping[Cell, Record]) -> dict[str, Metric]:
    """The columns of the tables, in order; ExAccErr at the longest response that every cell's curve reaches."""
    first, *others = study.evaluate
    curves = [r["evaluations"][first].exposure_bias for c, r in records.items() if c.name != TEACHER]
    longest, names = min((len(curve.length) for curve in curves), default=0), {curve.name for curve in curves}
    if len(names) > 1:
        raise ConfigError(f"{study.results} holds cells of {' and '.join(sorted(names))}, which cannot be compared")

    def of(read: Callable[[Evaluation], float], name: str = first) -> Callable[[Record], float]:
        return lambda record: read(record["evaluations"][name])

    def mean(key: str, name: str = first) -> Callable[[Record], float]:
        return of(lambda found: found.means[key].mean if key in found.means else math.nan, name)

    def exposure(found: Evaluation) -> float:
        return found.exposure_bias.exaccerr[longest - 1] if found.exposure_bias and longest else math.nan

    def over_sets(record: Record) -> float:
        return fmean(mean("rouge_l/sampled", name)(record) for name in study.evaluate)

    return {
        "rouge": Metric(f"ROUGE-L, {first}", mean("rouge_l/sampled"), 2, 1),
        "greedy": Metric("greedy", mean("rouge_l/greedy"), 2, 1),
        **{f"rouge {n}": Metric(f"ROUGE-L, {n}", mean("rouge_l/sampled", n), 2, 1) for n in others},
        "rouge all": Metric("ROUGE-L, mean of the sets", over_sets, 2, 1),
        "rkl": Metric("reverse KL, own text", mean("reverse_kl/own_samples"), 3, -1),
        "fkl": Metric("forward KL, teacher's text", mean("forward_kl/teacher_samples"), 3, -1),
        "exposure": Metric(f"{names.pop() if names else 'ExAccErr'}({longest}), %", of(exposure), 1, -1),
        "ece": Metric("ECE", of(lambda found: found.calibration["next_token"].ece), 3, -1),
        "distinct": Metric("distinct-4, %", of(lambda found: found.distinct["4"].mean), 1, 0),
        "length": Metric("length", of(lambda found: found.length["sampled"].mean), 1, 0),
    }


def write_document(study: Study, page: Path, command: str) -> Path:
    """Write docs/study.md and its figures. Raises ConfigError where no cell that trained is done."""
    records = load_records(study)
    if not any(cell.name not in (TEACHER, START) for cell in records):
        raise ConfigError(f"{study.results} holds no finished cell yet: run some with `{command}` without --report")
    columns, left = metrics(study, records), study.unfinished()
    state = f"{len(left)} of {len(study.cells())} cells are not done yet." if left else "All cells are done."
    parts = [
        "# The paper's claims, measured at a small size",
        f"Made by `{command}` from the JSON in `{study.results}`; do not edit. {state}",
        setup(study, records),
        study.notes.strip(),
        "## Verdicts",
        str(__doc__).partition("\n\n")[2].strip(),
        verdicts(study, records, columns),
        "## Tables",
        *[table(study, records, columns, size) for size in study.sizes],
        "ROUGE-L of answers sampled at temperature 1. KL in nats per token; ECE of next tokens on reference answers. "
        "ExAccErr at or below 0: no excess error accumulates; there a lower value is no advantage, and is not judged. "
        "Tokens: what the student was trained on, prompts and text included.",
        "## Ablations",
        ablations(study, records, columns),
        *variations(study, records, columns),
        "## Figures",
        *draw(study, records, page.parent / page.stem),
        "## Cost",
        cost(records),
    ]
    write_atomically(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def load_records(study: Study) -> dict[Cell, Record]:
    """What the cells that are done have written, by cell."""
    records = {}
    for cell in study.cells():
        if study.result(cell).exists():
            record = json.loads(study.result(cell).read_text(encoding="utf-8"))
            found = {name: Evaluation.from_dict(tree) for name, tree in record["evaluations"].items()}
            records[cell] = record | {"evaluations": found}
    return records


def setup(study: Study, records: Mapping[Cell, Record]) -> str:
    first = next(iter(study.evaluate))
    sizes = {c.size: r["parameters"] for c, r in records.items() if "parameters" in r}
    steps = {c.size: r["training"]["steps"] for c, r in records.items() if c.name == START}
    students = "; ".join(f"{size}, {count / 1e6:.0f} M parameters" for size, count in sizes.items())
    starts = ", ".join(f"{count} for {size}" for size, count in steps.items())
    prompts = {n: r.prompts for r in records.values() for n, r in r["evaluations"].items()}
    sets = ", ".join(f"{n} ({count} prompts)" for n, count in prompts.items())
    return (
        f"Teacher: {study.base['model']['teacher']}. Students, cut from it: {students}. Every method goes on from "
        f"one start per size and seed (steps of {study.start.get('method')}: {starts}) and takes "
        f"as many steps as reach {REFERENCE}'s tokens. Trained on {study.base['data']['train']}; evaluated on {sets}, "
        f"the divergences on {first}. Seeds: {', '.join(map(str, study.seeds))}. All else stands in the study's YAML."
    )


# ---- tables


def table(study: Study, records: Mapping[Cell, Record], columns: Mapping[str, Metric], size: str) -> str:
    names = [START, *(name for name in study.methods if name != REFERENCE), REFERENCE, *study.variations]
    return _table(f"**{size}**", records, columns, [(size, name) for name in names], teacher=True)


def ablations(study: Study, records: Mapping[Cell, Record], columns: Mapping[str, Metric]) -> str:
    rows = [(study.ablated_size, name) for name in (REFERENCE, *study.ablations)]
    return _table(f"**{study.ablated_size}**", records, columns, rows)


def _table(
    corner: str,
    records: Mapping[Cell, Record],
    columns: Mapping[str, Metric],
    rows: Sequence[tuple[str, str]],
    teacher: bool = False,
) -> str:
    lines = [[corner, "seeds", "tokens", *(metric.title for metric in columns.values())]]
    for size, name in rows:
        found = [r for c, r in records.items() if (c.size, c.name) == (size, name)]
        if found:
            tokens = fmean(r["training"]["num_tokens"] for r in found)
            lines.append([name, str(len(found)), f"{tokens:,.0f}", *(_cell(m, found) for m in columns.values())])
    found = [r for c, r in records.items() if c.name == TEACHER]
    if found and teacher:
        lines.append([TEACHER, "", "", *(_cell(m, found) for m in columns.values())])
    return _markdown(lines) if len(lines) > 1 else ""


def _cell(metric: Metric, found: Sequence[Record]) -> str:
    values = [value for value in map(metric.read, found) if not math.isnan(value)]
    if not values:
        return ""
    spread = f" ± {stdev(values):.{metric.digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{metric.digits}f}{spread}"


def cost(records: Mapping[Cell, Record]) -> str:
    seconds = {part: sum(r["seconds"][part] for r in records.values()) for part in ("training", "evaluation")}
    environments = [record["environment"] for record in records.values()]
    machines = sorted({f"{e['cpu']} (threads a run: {e['threads']})" for e in environments})
    longest = max(sum(r["seconds"].values()) for r in records.values())
    return (
        f"{len(records)} cells, {seconds['training'] / 3600:.1f} h of training and "
        f"{seconds['evaluation'] / 3600:.1f} h of evaluation on {'; '.join(machines)}; "
        f"the longest cell {longest / 60:.0f} minutes."
    )


# ---- verdicts


class Difference(NamedTuple):
    """Of one metric, minillm (or a variation of it) minus a rival, over the seeds that both have."""

    size: str
    rival: str
    metric: Metric
    values: list[float]

    @property
    def verdict(self) -> str:
        return judge(*interval(self.values), self.metric.better) if self.metric.better else ""

    def __str__(self) -> str:
        digits, (low, high) = self.metric.digits, interval(self.values)
        within = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if math.isfinite(low) else ""
        return f"{fmean(self.values):+.{digits}f}{within}" + (f" **{self.verdict}**" if self.verdict else "")


def verdicts(study: Study, records: Mapping[Cell, Record], columns: Mapping[str, Metric]) -> str:
    """One row per claim of the paper and size, one column per rival; then the ablations; before both, in words."""
    rivals = [name for name in study.methods if name != REFERENCE]
    claims = [*(key for key in columns if key.startswith("rouge")), "rkl", "exposure", "ece", "distinct"]
    exposure = columns["exposure"]
    excess = exposure._replace(title=f"{exposure.title}, above 0", read=lambda r: max(exposure.read(r), 0.0))
    columns = {**columns, "exposure": excess}
    judged: list[Difference] = []

    def row(size: str, names: Sequence[str], metric: Metric) -> list[str]:
        sizes = list(study.sizes) if size == ALL else [size]
        found = [_difference(records, size, sizes, (REFERENCE, name), metric) for name in names]
        judged.extend(each for each in found if each and each.verdict)
        return ["" if each is None else str(each) for each in found]

    lines = [[f"{REFERENCE} minus", "size", *rivals]]
    for key in claims:
        metric = columns[key]
        claim = {1: "claimed higher", -1: "claimed lower", 0: "claimed close to 0"}[metric.better]
        for size in (*study.sizes, *([ALL] if len(study.sizes) > 1 else [])):
            if any(found := row(size, rivals, metric)):
                lines.append([f"{metric.title} ({claim})", size, *found])
    ablated = [[f"{REFERENCE} minus", *study.ablations]]
    for key in (k for k in claims if k.startswith("rouge")):
        if any(found := row(study.ablated_size, list(study.ablations), columns[key])):
            ablated.append([columns[key].title, *found])
    parts = [
        in_words(judged),
        _markdown(lines),
        f"Without one of its parts, {study.ablated_size} (each is claimed to raise ROUGE-L):",
        _markdown(ablated),
    ]
    return "\n\n".join(part for part in parts if part)


def variations(study: Study, records: Mapping[Cell, Record], columns: Mapping[str, Metric]) -> list[str]:
    """Differences of what is no claim of the paper and therefore not judged."""
    parts, rivals = [], [name for name in study.methods if name != REFERENCE]
    for name, changes in study.variations.items():
        lines = [[f"{name} minus", "size", *rivals, REFERENCE]]
        for metric in (columns[key]._replace(better=0) for key in ("rouge all", "rkl", "ece", "length")):
            for size, sizes in (*((size, [size]) for size in study.sizes), (ALL, list(study.sizes))):
                found = [_difference(records, size, sizes, (name, rival), metric) for rival in (*rivals, REFERENCE)]
                if any(found):
                    lines.append([metric.title, size, *("" if each is None else str(each) for each in found)])
        if len(lines) > 1:
            said = yaml.safe_dump(changes, default_flow_style=True).strip()
            parts += [f"A variation of {REFERENCE}, not judged: {name}, `{said}`.", _markdown(lines)]
    return ["## Variations", *parts] if parts else []


def in_words(judged: Sequence[Difference]) -> str:
    """What is decided, metric by metric, and how much of it chance alone would decide."""
    lines = []
    for title in dict.fromkeys(each.metric.title for each in judged):
        found = [each for each in judged if each.metric.title == title]
        said = []
        for verdict in ("holds", "fails"):
            rivals = [f"{each.rival} ({each.size})" for each in found if each.verdict == verdict]
            if rivals:
                said.append(f"{verdict} against {', '.join(rivals)}")
        if undecided := sum(each.verdict == "open" for each in found):
            said.append(f"open in {undecided} of {len(found)}")
        lines.append(f"- {title}: {'; '.join(said)}.")
    decidable = sum(len(each.values) > 1 for each in judged)
    if decidable:
        lines.append(
            f"\n{decidable} of these differences have two seeds or more, and so an interval. If all of them were "
            f"truly zero, {decidable / 20:.1f} of the intervals would still exclude 0, on average."
        )
    return "\n".join(lines)


def _difference(
    records: Mapping[Cell, Record], label: str, sizes: Sequence[str], pair: tuple[str, str], metric: Metric
) -> Difference | None:
    minuend, rival = pair
    values = [
        metric.read(record) - metric.read(records[other])
        for cell, record in records.items()
        if cell.name == minuend and cell.size in sizes and (other := cell._replace(name=rival)) in records
    ]
    return Difference(label, rival, metric, values) if values and not any(map(math.isnan, values)) else None


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of their mean by Student's t; all numbers where there are too few."""
    from scipy.stats import t

    if len(differences) < 2:
        return -math.inf, math.inf
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half


def judge(low: float, high: float, better: int) -> str:
    """Of a difference whose 95 % interval is [low, high], where `better` is the side claimed."""
    if better < 0:
        low, high = -high, -low
    return "holds" if low > 0 else "fails" if high < 0 else "open"


# ---- figures


def draw(study: Study, records: Mapping[Cell, Record], folder: Path) -> list[str]:
    """PNG files in `folder`, of the first seed that is done of each size; returns Markdown."""
    first, seed = next(iter(study.evaluate)), study.seeds[0]
    images = []
    for size in study.sizes:
        names = [START, *(n for n in study.methods if n != REFERENCE), REFERENCE]
        found = {n: records[Cell(size, n, seed)] for n in names if Cell(size, n, seed) in records}
        results = {name: record["evaluations"][first] for name, record in found.items()}
        if not results:
            continue
        for name, title, figure in (
            ("exposure", "Exposure bias", figures.exposure(results)),
            ("reliability", "Calibration of next tokens", figures.reliability(results)),
            ("lengths", "ROUGE-L by length of the reference", figures.buckets(results)),
        ):
            images.append(_image(f"{title}, {size}, seed {seed}", figure, folder / f"{name}-{size}.png"))
    names = [REFERENCE, *study.ablations]
    curves = {n: records[c]["metrics"] for n in names if (c := Cell(study.ablated_size, n, seed)) in records}
    title = f"Learning curves of {REFERENCE} and its ablations, {study.ablated_size}, seed {seed}"
    images.append(_image(title, figures.learning_curves(curves), folder / "curves.png"))
    return [image for image in images if image]


def _image(title: str, figure: Any, path: Path) -> str:
    if figure is None:
        return ""
    figures.save(figure, path)
    return f"{title}:\n\n![{title}]({path.parent.name}/{path.name})"
