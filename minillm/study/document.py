"""The study's page, docs/study.md: what was laid down, what came out, tables and figures, from the cells' JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from minillm.evaluation.means import Mean
from minillm.evaluation.result import START, TEACHER, Evaluation
from minillm.files import write_atomically
from minillm.report import figures
from minillm.study import choice
from minillm.study.endpoints import Endpoint, Record, Records, difference, endpoints, find, load_records, of
from minillm.study.judgement import DRAWS, Difference, detectable, holm, verdict
from minillm.study.plan import LOSS, REFERENCE, ROUGE, Cell, Study

BUCKET = 30
"""Prompts that each bucket of reference lengths holds at least."""


def write_document(study: Study, page: Path, command: str) -> Path:
    """Write docs/study.md and its figures."""
    records, left = load_records(study), study.unfinished()
    state = f"{len(left)} of {len(study.cells())} cells are not done yet." if left else "All cells are done."
    parts = [
        "# The paper's claim, tested where it can hold",
        f"Made by `{command}` from the JSON in `{study.results}`; do not edit. {state}",
        study.findings.strip(),
        "## Protocol",
        study.protocol.strip(),
        *_section("## What the validation decided", choices(study, records)),
        *_section("## Primary endpoint", primary(study, records)),
        *_section("## Secondary endpoints", secondary(study, records)),
        *_section("## Without one of its parts, and with more or less of the teacher", changes(study, records)),
        *_section("## By length of the reference", by_length(study, records)),
        *_section("## All numbers", table(study, records)),
        *_section("## Figures", *draw(study, records, page.parent / page.stem)),
        *_section("## Cost", cost(records)),
        *_section("## Appendix: an earlier study", appendix(study)),
    ]
    write_atomically(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _section(title: str, *texts: str) -> list[str]:
    return [title, *texts] if any(texts) else []


def choices(study: Study, records: Records) -> str:
    """The candidates, which was chosen, and whether the gate is passed."""
    lines = [["training", "value", "ROUGE-L", "loss, nats/token", ""]]
    for name in study.grids:
        cells = study.candidates(name)
        if all(cell in records for cell in cells):
            chosen = choice.choose(study, name)
            for cell in cells:
                means = choice.validation(study, cell)
                found = [f"{means[ROUGE].mean:.2f}", f"{means[LOSS].mean:.3f}"]
                lines.append([name, cell.candidate, *found, "chosen" if cell.candidate == chosen else ""])
    parts = [_markdown(lines)] if len(lines) > 1 else []
    if {study.teacher, Cell(START, study.seeds[0])} <= records.keys():
        ahead = choice.headroom(study)
        passed = "passed" if ahead >= study.gate else "not passed: the study stops here"
        parts.append(f"The teacher's ROUGE-L is {ahead:.2f} above the start's; the gate, {study.gate:g}, is {passed}.")
    if (rival := _rival(study, records)) is not None:
        parts.append(f"The best rival of {REFERENCE} on the validation prompts is {rival}.")
    return "\n\n".join(parts)


def _rival(study: Study, records: Records) -> str | None:
    """The best rival, once it is known."""
    needed = [c for name in study.methods for c in study.candidates(name) or [Cell(name, study.seeds[0])]]
    return choice.best_rival(study) if all(cell in records for cell in needed) else None


def primary(study: Study, records: Records) -> str:
    rival = _rival(study, records)
    endpoint = endpoints(records)["rouge"]
    ours, theirs = of(records, REFERENCE), of(records, rival or "")
    found = difference(endpoint, ours, theirs)
    if found is None:
        return ""
    prompts = find(next(iter(ours.values())), ROUGE).prompts  # type: ignore[union-attr]
    return (
        f"ROUGE-L of {REFERENCE} minus {rival}: {_text(endpoint, found)}, p = {_p(found.p)}: the claim "
        f"**{verdict(found, 1, found.p)}**. {prompts} prompts, {len(ours.keys() & theirs.keys())} seeds, {DRAWS:,} "
        f"draws; an interval of this width finds a true difference of {detectable(found):.1f} points with a "
        "probability of 80 %."
    )


def secondary(study: Study, records: Records) -> str:
    """Each endpoint against each rival; all p-values are corrected together."""
    rivals = [name for name in study.methods if name != REFERENCE]
    ours = of(records, REFERENCE)
    _, *others = endpoints(records).values()
    found = {(e.title, name): difference(e, ours, of(records, name)) for e in others for name in rivals}
    known = {key: each for key, each in found.items() if each is not None}
    corrected = dict(zip(known, holm([each.p for each in known.values()]), strict=True))
    lines = [[f"{REFERENCE} minus", *rivals]]
    for endpoint in others:
        claim = {1: " (claimed higher)", -1: " (claimed lower)", 0: ""}[endpoint.better]
        row = []
        for name in rivals:
            each, p = found[endpoint.title, name], corrected.get((endpoint.title, name), 1.0)
            judged = f" **{verdict(each, endpoint.better, p)}**" if each and endpoint.better else ""
            row.append(f"{_text(endpoint, each)}, p = {_p(p)}{judged}" if each else "")
        if any(row):
            lines.append([endpoint.title + claim, *row])
    if len(lines) == 1:
        return ""
    return _markdown(lines) + "\n\nIntervals of 95 %; p-values after Holm's correction for all of the table."


def changes(study: Study, records: Records) -> str:
    """Minillm against each of its ablations and variations, at the seed that they have."""
    found, ours = endpoints(records), of(records, REFERENCE)
    shown = [found[key] for key in ("rouge", "rkl", "length")]
    lines = [[f"{REFERENCE} minus", *(endpoint.title for endpoint in shown)]]
    for name in (*study.ablations, *study.variations):
        differences = [difference(endpoint, ours, of(records, name)) for endpoint in shown]
        if any(differences):
            row = [_text(e, d) if d else "" for e, d in zip(shown, differences, strict=True)]
            lines.append([f"{name}, `{_inline(study.trainings[name])}`", *row])
    if len(lines) == 1:
        return ""
    return _markdown(lines) + "\n\nOne seed: the intervals are over prompts alone, and not corrected."


def by_length(study: Study, records: Records) -> str:
    """ROUGE-L over thirds of the prompts, by the tokens of their references."""
    names = [name for name in (TEACHER, START, *study.methods) if of(records, name)]
    if not names:
        return ""
    record = next(iter(of(records, names[0]).values()))
    (where,) = [key for key, found in record["evaluations"].items() if found is find(record, ROUGE)]
    lengths = record["reference_lengths"][where]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    count = min(3, len(order) // BUCKET)
    if count < 2:
        return ""
    thirds = [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]
    heads = [f"{lengths[part[0]]}–{lengths[part[-1]]} tokens ({len(part)} prompts)" for part in thirds]
    lines = [["ROUGE-L", *heads]]
    for name in names:
        row = []
        for part in thirds:
            values = []
            for each in of(records, name).values():
                mean = find(each, ROUGE).means[ROUGE]  # type: ignore[union-attr]
                values.append(Mean.of(mean.totals[part], mean.counts[part]).mean)
            row.append(f"{fmean(values):.2f}")
        lines.append([name, *row])
    return _markdown(lines)


def table(study: Study, records: Records) -> str:
    found = endpoints(records).values()
    lines = [["", "seeds", "response tokens", "minutes", *(endpoint.title for endpoint in found)]]
    for name in (TEACHER, START, *study.methods, *study.ablations, *study.variations):
        if rows := list(of(records, name).values()):
            tokens, seconds = (fmean(r["training"][key] for r in rows) for key in ("response_tokens", "cpu_time"))
            columns = [endpoint.text(rows) for endpoint in found]
            lines.append([name, str(len(rows)), f"{tokens:,.0f}", f"{seconds / 60:.0f}", *columns])
    if len(lines) == 1:
        return ""
    return _markdown(lines) + (
        "\n\nMeans over the seeds ± their standard deviation. Answers are sampled at temperature 1; KL in nats per "
        "token. Response tokens: those that the loss was on, each pass counted. Minutes: of a processor, in "
        "training."
    )


def cost(records: Records) -> str:
    if not records:
        return ""
    hours = {part: sum(r["seconds"][part] for r in records.values()) / 3600 for part in ("training", "evaluation")}
    machines = sorted({f"{r['environment']['cpu']} ({r['environment']['threads']} threads)" for r in records.values()})
    longest = max(sum(record["seconds"].values()) for record in records.values())
    return (
        f"{len(records)} cells, {hours['training']:.1f} h of training and {hours['evaluation']:.1f} h of evaluation "
        f"on {'; '.join(machines)}; the longest cell {longest / 60:.0f} minutes."
    )


def appendix(study: Study) -> str:
    """The means of an earlier study's cells, on its first set."""
    if not study.appendix:
        return ""
    groups: dict[str, list[Evaluation]] = {}
    for path in sorted(Path(study.appendix["results"]).rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        cell, found = record["cell"], next(iter(record["evaluations"].values()))
        groups.setdefault(f"{cell['size']} {cell['name']}".strip(), []).append(Evaluation.from_dict(found))
    lines = [["", "seeds", "ROUGE-L", "reverse KL, own text", "ECE", "length"]]
    for name, found in groups.items():
        columns = (
            (2, [e.means[ROUGE].mean for e in found]),
            (3, [e.means[key].mean for e in found if (key := "reverse_kl/own_samples") in e.means]),
            (3, [e.calibration["next_token"].ece for e in found]),
            (1, [e.length["sampled"].mean for e in found]),
        )
        lines.append([name, str(len(found)), *(f"{fmean(v):.{digits}f}" if v else "" for digits, v in columns)])
    return f"{str(study.appendix['text']).strip()}\n\n{_markdown(lines)}"


# ---- figures


def draw(study: Study, records: Records, folder: Path) -> list[str]:
    """PNG files in `folder`, of the first seed; returns Markdown."""
    first = study.seeds[0]
    results = {n: r[first] for n in (START, *study.methods) if first in (r := of(records, n))}
    if not results:
        return []
    curves = {n: _with(record, lambda e: e.exposure_bias) for n, record in results.items()}
    sure = {n: _with(record, lambda e: e.calibration) for n, record in results.items()}
    steps = {n: records[c]["metrics"] for n in study.methods if (c := Cell(n, first)) in records}
    images = (
        ("learning", "Learning curves", figures.learning_curves(steps)),
        ("exposure", "Exposure bias over length", figures.exposure(_known(curves))),
        ("reliability", "Calibration of next tokens", figures.reliability(_known(sure))),
        ("alpha", "ROUGE-L and reverse KL by the teacher's share α", alpha(study, records)),
    )
    return [_image(f"{title}, seed {first}", figure, folder / f"{name}.png") for name, title, figure in images]


def alpha(study: Study, records: Records) -> Any:
    """The cells that differ from minillm in rollout.alpha alone, and minillm, at the first seed."""
    points: list[tuple[float, Record]] = []
    for name in (REFERENCE, *study.ablations, *study.variations):
        tree = study.trainings[name]
        share = tree.get("rollout", {}).get("alpha")
        if share is not None and (name == REFERENCE or tree == {"rollout": {"alpha": share}}):
            points += [(share, r) for seed, r in of(records, name).items() if seed == study.seeds[0]]
    if len(points) < 2:
        return None
    found = endpoints(records)
    shares, kept = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    panels = {}
    for endpoint in (found["rouge"], found["rkl"]):
        assert endpoint.per_prompt is not None
        means = [Mean.of(*endpoint.per_prompt(record)) for record in kept]
        panels[endpoint.title] = [(mean.mean, mean.standard_error) for mean in means]
    return figures.curves("α", shares, panels)


def _with(record: Record, part: Any) -> Evaluation | None:
    return next((found for found in record["evaluations"].values() if part(found)), None)


def _known(results: Mapping[str, Evaluation | None]) -> dict[str, Evaluation]:
    return {name: result for name, result in results.items() if result is not None}


def _image(title: str, figure: Any, path: Path) -> str:
    if figure is None:
        return ""
    figures.save(figure, path)
    return f"{title}:\n\n![{title}]({path.parent.name}/{path.name})"


# ---- text


def _text(endpoint: Endpoint, found: Difference) -> str:
    digits = endpoint.digits
    known = f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]" if math.isfinite(found.low) else ""
    return f"{found.mean:+.{digits}f}{known}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _inline(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), default_flow_style=True, sort_keys=False, width=10_000).strip()


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])
