"""What a run amounts to: paired changes, the table on the terminal, the model card; and one evaluation as a table."""

from collections.abc import Mapping
from itertools import pairwise

from minillm.config.recipe import Recipe
from minillm.evaluation.means import difference
from minillm.evaluation.result import OWN, REFERENCES, ROUGE, START, TEACHER, Evaluation
from minillm.report.numbers import mean, number, plus_minus
from minillm.run.clock import duration
from minillm.terminal import printable

TITLES = {OWN: "reverse KL, own samples", REFERENCES: "reverse KL, references", ROUGE: "ROUGE-L"}


def changes(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, dict[str, float]]]:
    """Per stage, the paired difference of each mean from the evaluation before it, also relative to that one."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for before, after in pairwise(_of_student(evaluations)):
        result[after] = {}
        for name, value in evaluations[after].means.items():
            earlier = evaluations[before].means[name]
            change = difference(value, earlier)
            result[after][name] = {**change, "relative": change["mean"] / earlier.mean if earlier.mean else 0.0}
    return result


def run_text(evaluations: Mapping[str, Evaluation], seconds: Mapping[str, float]) -> str:
    """A run as plain text: responses side by side, the table of means ± standard errors, then where the time went."""
    lines = []
    for i, response in enumerate(evaluations[START].responses if evaluations else ()):
        lines += ["", f"prompt: {printable(response.prompt)}"]
        for stage, evaluation in evaluations.items():
            lines += [f"  {stage}: {_one_line(each.greedy or '')}" for each in evaluation.responses[i : i + 1]]
    if evaluations:
        last = _of_student(evaluations)[-1]
        lines += ["", "held-out prompts, mean ± standard error (nats per token; ROUGE-L 0-100)", ""]
        rows = [["", *evaluations, f"change in {last}"]]
        changed = changes(evaluations).get(last, {})
        for name, title in TITLES.items():
            if name in evaluations[last].means:
                row = [title, *(mean(e.means[name]) if name in e.means else "0" for e in evaluations.values())]
                change = changed.get(name)
                row.append(_change(change) if change else "")
                rows.append(row)
        lines.append(_aligned(rows))
    times = ", ".join(f"{phase} {duration(value)}" for phase, value in seconds.items())
    return "\n".join([*lines, "", f"time: {times}"])


def card(recipe: Recipe, command: str, evaluations: Mapping[str, Evaluation]) -> str:
    """Model card: where the model comes from, how it was made, what was measured."""
    model = recipe.run.model
    origin = model.student or (
        f"{model.teacher} without its layers [{model.drop_layers[0]}, {model.drop_layers[1]})"
        if model.drop_layers
        else model.teacher
    )
    data = ", ".join(dict.fromkeys(stage.data.train for stage in recipe.stages.values()))
    text = ", ".join(dict.fromkeys(stage.data.text for stage in recipe.stages.values() if stage.data.text))
    methods = ", then ".join(stage.method for stage in recipe.stages.values())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [distillation, minillm]",
        "---",
        f"# {recipe.name}",
        "",
        f"Student: {origin}. Teacher: {model.teacher or 'none'}. Method: {methods}.",
        f"Data: {data}; text: {text or 'none'}. The licences of the teacher and data apply.",
        "",
        f"Made by `{command}`, configuration {recipe.digest()}.",
        "",
    ]
    if evaluations:
        last = evaluations[_of_student(evaluations)[-1]]
        lines += ["| held-out prompts | mean | standard error |", "|---|---|---|"]
        for name, title in TITLES.items():
            if name in last.means:
                found = last.means[name]
                lines.append(f"| {title} | {number(found.mean, 3)} | {number(found.standard_error, 3)} |")
        lines.append("")
    lines.append("MiniLLM: Gu, Dong, Wei, Huang, ICLR 2024, arXiv 2306.08543.")
    return "\n".join(lines) + "\n"


def evaluation_text(evaluation: Evaluation) -> str:
    """A whole evaluation as a table: means ± standard errors over prompts, [± deviations over seeds]."""
    means, ways = evaluation.means, ("greedy", "sampled")
    rows = [["", *ways]]
    for name, title in (("rouge_l", "ROUGE-L"), ("exact_match", "exact match, %")):
        sampled = means[f"{name}/sampled"]
        assert sampled.seeds is not None
        spread = f"  [± {sampled.seeds.standard_deviation:.3f} over {len(sampled.seeds.by_seed)} seeds]"
        rows.append([title, mean(means[f"{name}/greedy"]), mean(sampled) + spread])
    for name, part in evaluation.by_reference_length.items():
        if part:
            title = f"ROUGE-L, {part[ROUGE].prompts} references of {name} tokens"
            rows.append([title, *(mean(part[f"rouge_l/{way}"]) for way in ways)])
    rows.append(["answer length, tokens", *(f"{evaluation.length[way].mean:.1f}" for way in ways)])
    rows += [[f"distinct-{n}, %", "", number(value.mean, 2)] for n, value in evaluation.distinct.items()]
    rows.append(["", "references", "own samples"])
    rows.append(["loss, nats per token", mean(means["loss"]), ""])
    if OWN in means:
        rows.append(["reverse KL, nats per token", mean(means[REFERENCES]), mean(means[OWN])])
        rows.append(["forward KL, nats per token", mean(means["forward_kl/references"]), ""])
    if bias := evaluation.exposure_bias:
        for i in (i for i in range(len(bias.length)) if i in (3, 15, 63, len(bias.length) - 1)):
            value = f"{number(bias.exaccerr[i], 1, sign=True)} ± {number(bias.standard_error[i], 1)}"
            rows.append([f"{bias.name} at {bias.length[i]} tokens, %", "", value])
    for name, found in evaluation.calibration.items():
        title = f"calibration, {name.replace('_', ' ')}: ECE (accuracy)"
        rows.append([title, f"{found.ece:.3f} ({found.accuracy:.3f})", ""])
    rows.append(["greedy decoding", f"{evaluation.tokens_per_second:.0f} tokens per second", ""])
    return _aligned(rows)


def _of_student(evaluations: Mapping[str, Evaluation]) -> list[str]:
    return [name for name in evaluations if name != TEACHER]


def _change(change: dict[str, float]) -> str:
    return f"{plus_minus(change['mean'], change['standard_error'], sign=True)}  ({change['relative']:+.1%})"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
