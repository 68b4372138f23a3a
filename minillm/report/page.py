"""One HTML file that needs no other, and its figures as PNG beside it."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.evaluation.result import OWN, REFERENCES, ROUGE, Evaluation
from minillm.files import flatten, write_atomically
from minillm.report import figures
from minillm.report.numbers import mean, number, plus_minus
from minillm.report.read import Source, read_sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd } p.note { color: #555; max-width: 52rem }
table { border-collapse: collapse; font-size: 14px } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem; border-bottom: 1px solid #eee }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.samples td { min-width: 11rem; white-space: pre-wrap } img { max-width: 100% } code { font-size: 13px }
"""


def write_report(paths: Sequence[str], out: str) -> Path:
    """Write out/index.html and out/*.png; returns the path of the page.

    Raises FileNotFoundError or DataError for a path that is no run, ConfigError if matplotlib is missing.
    """
    sources, folder = read_sources(paths), Path(out)
    figures.new_figure(1, 1)  # before any work
    page = folder / "index.html"
    write_atomically(page, html(sources, folder))
    return page


def html(sources: Sequence[Source], folder: Path) -> str:
    results = {label: result for source in sources for label, result in source.results.items()}
    metrics = {source.name: source.metrics for source in sources if source.metrics}
    parts = [
        "<h1>Distillation report</h1>",
        _list([f"<b>{escape(s.name)}</b>: {_command(s)}" for s in sources]),
        *_methods(results),
        *_stages(sources),
        *_figure(
            "Learning curves",
            "curves",
            figures.learning_curves(metrics),
            folder,
            "From metrics.jsonl. Faint: each logged step; strong: running mean of nine.",
        ),
    ]
    if results:
        bias = ". Or: ".join(dict.fromkeys(r.exposure_bias.definition for r in results.values() if r.exposure_bias))
        note = f"{bias}. Zero: the student errs on its own text as on its teacher's. Band: ± one standard error."
        parts += _figure("Exposure bias", "exposure", figures.exposure(results), folder, note)
        note = "Along the references, ten bins; on the diagonal a model is right as often as it is sure."
        parts += _figure("Calibration of next tokens", "reliability", figures.reliability(results), folder, note)
        note = "The choice among the options of each question, by the probability of the label words."
        choice = figures.reliability(results, "options")
        parts += _figure("Calibration of options", "reliability-options", choice, folder, note)
        note = "ROUGE-L of sampled responses, by the tokens of the prompt's reference; bars: ± one standard error."
        parts += _figure("By length of the reference", "lengths", figures.buckets(results), folder, note)
    parts += _responses(sources, results)
    if results:
        parts += _generation(results)
    parts += _environment(sources)
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html>\n<html lang=en>{head}<title>Distillation report</title><style>{CSS}</style>{body}</html>\n"
    )


# ---- tables


def numbers(result: Evaluation) -> dict[str, str]:
    """The numbers of one evaluation, by title."""
    means, row = result.means, {}
    if (sampled := means.get("rouge_l/sampled")) and sampled.seeds:
        row["ROUGE-L, sampled"] = plus_minus(sampled.mean, sampled.seeds.standard_deviation, 2)
    for name, title, digits in (
        (ROUGE, "ROUGE-L, greedy", 2),
        ("exact_match/greedy", "exact match, greedy, %", 1),
        ("loss", "loss on references", 3),
        (OWN, "reverse KL, own text", 3),
        (REFERENCES, "reverse KL, references", 3),
        ("forward_kl/teacher_samples", "forward KL, teacher's text", 3),
    ):
        if name in means:
            row[title] = number(means[name].mean, digits)
    if (bias := result.exposure_bias) and bias.length:
        row[f"{bias.name}({bias.length[-1]}), %"] = number(bias.exaccerr[-1], 1)
    for what, title in (("next_token", "ECE, next token"), ("options", "ECE, options")):
        if what in result.calibration:
            row[title] = f"{result.calibration[what].ece:.3f}"
    if "4" in result.distinct:
        row["distinct-4, %"] = number(result.distinct["4"].mean, 1)
    if "sampled" in result.length:
        row["length"] = f"{result.length['sampled'].mean:.1f}"
    if result.tokens_per_second:
        row["tokens/s"] = f"{result.tokens_per_second:.0f}"
    return row


def _methods(results: Mapping[str, Evaluation]) -> Iterator[str]:
    if not results:
        return
    rows = {label: numbers(result) for label, result in results.items()}
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    yield "<h2>Evaluations</h2>"
    data = {f"{r.prompts} prompts of {r.about.get('data', 'unknown data')}" for r in results.values()}
    warning = " <b>They differ: these evaluations are not comparable.</b>" if len(data) > 1 else ""
    yield _note(f"{escape('; '.join(sorted(data)))}.{warning}")
    yield _table(["", *rows], [[title, *(row.get(title, "") for row in rows.values())] for title in titles])
    yield _note(
        "Means; of sampled ROUGE-L ± the deviation over the sampling seeds. Loss and divergences in nats per token; "
        "length in tokens of sampled responses, end-of-sequence included; tokens/s of greedy decoding on this machine."
    )


def _stages(sources: Sequence[Source]) -> Iterator[str]:
    """What the runs measured around their stages."""
    titles = {OWN: "reverse KL, own text", REFERENCES: "reverse KL, references", ROUGE: "ROUGE-L, greedy"}
    rows = [
        [source.name, stage, *(mean(result.means[name]) if name in result.means else "" for name in titles)]
        for source in sources
        for stage, result in source.stages.items()
    ]
    if rows:
        yield "<h2>After each stage</h2>"
        yield _table(["", "stage", *titles.values()], rows, text_columns=2)
        yield _note("Means ± standard errors over the held-out prompts of the run (section eval of its config.yaml).")


def _responses(sources: Sequence[Source], results: Mapping[str, Evaluation]) -> Iterator[str]:
    """A table per run, of its stages, and one of the evaluations made afterwards."""
    tables = {source.name: source.stages for source in sources} | {"": results}
    tables = {name: found for name, found in tables.items() if any(e.responses for e in found.values())}
    if tables:
        yield "<h2>Responses side by side</h2>" + _note("Greedy, up to the token limit of the evaluation.")
    for name, evaluations in tables.items():
        if name and len(tables) > 1:
            yield f"<h3>{escape(name)}</h3>"
        responses: dict[str, dict[str, str]] = {}
        references: dict[str, str] = {}
        for label, evaluation in evaluations.items():
            for each in evaluation.responses:
                responses.setdefault(each.prompt, {})[label] = each.greedy or ""
                references[each.prompt] = _cut(each.references[0])
        rows = [[p, *(found.get(label, "") for label in evaluations), references[p]] for p, found in responses.items()]
        yield _table(["prompt", *evaluations, "reference"], rows, len(evaluations) + 2, style="samples")


def _generation(results: Mapping[str, Evaluation]) -> Iterator[str]:
    settings: dict[str, list[str]] = {}
    for label, result in results.items():
        settings.setdefault(json.dumps(result.generation, ensure_ascii=False), []).append(label)
    yield "<h2>Generation settings</h2>"
    if len(settings) > 1:
        yield _note("<b>They differ: these evaluations are not comparable.</b>")
    yield _list([f"{escape(', '.join(labels))}: <code>{escape(text)}</code>" for text, labels in settings.items()])


def _environment(sources: Sequence[Source]) -> Iterator[str]:
    environments = {source.name: source.environment for source in sources if source.environment}
    found = {name: {key: str(value) for key, value in flatten(tree)} for name, tree in environments.items()}
    if found:
        keys = list(dict.fromkeys(key for environment in found.values() for key in environment))
        rows = [[key, *(environment.get(key, "") for environment in found.values())] for key in keys]
        yield "<h2>Environment</h2>" + _table(["", *found], rows, text_columns=len(found) + 1)


# ---- pieces


def _figure(title: str, name: str, figure: "Figure | None", folder: Path, note: str) -> list[str]:
    if figure is None:
        return []
    data = base64.b64encode(figures.save(figure, folder / f"{name}.png").read_bytes()).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return [f"<h2>{escape(title)}</h2>", _note(escape(note)), image]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, style: str = "") -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ["" if i < text_columns else " class=number" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, row, strict=True))

    lines = [f"<tr>{cells(header, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return f'<div class=wide><table class="{style}">\n' + "\n".join(lines) + "\n</table></div>"


def _cut(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(maxsplit=1)[0] + " …"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _note(text: str) -> str:
    return f"<p class=note>{text}</p>"


def _command(source: Source) -> str:
    commands = [source.summary.get("command"), *(result.about.get("command") for result in source.results.values())]
    return "; ".join(f"<code>{escape(str(command))}</code>" for command in commands if command) or escape(
        str(source.path)
    )
