"""What a run amounts to: paired changes, the table on the terminal, the model card. Everything from summary.json."""

from itertools import pairwise
from typing import Any

from minillm.config.recipe import Recipe
from minillm.data.examples import Example
from minillm.evaluate import OWN, REFERENCES, ROUGE, Evaluation
from minillm.evaluate.means import difference
from minillm.run.directory import duration
from minillm.terminal import printable

TITLES = {OWN: "reverse KL, own samples", REFERENCES: "reverse KL, references", ROUGE: "ROUGE-L"}


def changes(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, dict[str, float]]]:
    """Per stage, each metric's paired difference from the evaluation before it, also relative to that value."""
    stages = list(evaluations)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for before, after in pairwise(stages):
        result[after] = {}
        for name, estimate in evaluations[after].estimates.items():
            earlier = evaluations[before].estimates[name]
            change = difference(estimate, earlier)
            result[after][name] = {**change, "relative": change["mean"] / earlier.mean if earlier.mean else 0.0}
    return result


def samples(
    examples: list[Example], evaluations: dict[str, Evaluation], teacher_answers: list[str]
) -> list[dict[str, Any]]:
    """Prompts with the reference and every greedy answer (cut at eval.rouge_new_tokens)."""
    return [
        {
            "prompt": example.record.prompt,
            "reference": example.record.answer,
            "teacher": teacher_answers[i] if teacher_answers else None,
            "answers": {stage: result.answers[i] for stage, result in evaluations.items()},
        }
        for i, example in enumerate(examples)
    ]


def report(summary: dict[str, Any]) -> str:
    """The summary as plain text: samples, then the table of means ± standard errors, then where the time went."""
    lines = []
    for sample in summary["samples"]:
        lines += ["", f"prompt: {printable(sample['prompt'])}"]
        lines += [f"  {stage}: {_one_line(answer)}" for stage, answer in sample["answers"].items()]
        if sample["teacher"] is not None:
            lines += [f"  teacher: {_one_line(sample['teacher'])}"]
    evaluations, stages = summary["evaluations"], list(summary["evaluations"])
    if stages:
        last = stages[-1]
        lines += ["", "held-out prompts, mean ± standard error (nats per token; ROUGE-L 0-100)", ""]
        rows = [["", *stages, "teacher", f"change in {last}"]]
        for name, title in TITLES.items():
            if name in evaluations[last]:
                row = [title, *(_pm(evaluations[stage][name]) for stage in stages)]
                score = (summary["teacher"] or {}).get(name)
                row.append(_pm(score) if score else "0" if name != ROUGE else "")
                change = summary["changes"].get(last, {}).get(name)
                row.append(f"{_pm(change, sign=True)}  ({change['relative']:+.1%})" if change else "")
                rows.append(row)
        lines.append(_aligned(rows))
    times = ", ".join(f"{phase} {duration(value)}" for phase, value in summary["seconds"].items())
    return "\n".join([*lines, "", f"time: {times}"])


def card(recipe: Recipe, command: str, summary: dict[str, Any]) -> str:
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
        f"Made by `{command}`, configuration {summary['config_hash']}.",
        "",
    ]
    if summary["evaluations"]:
        last = list(summary["evaluations"])[-1]
        lines += ["| held-out prompts | mean | standard error |", "|---|---|---|"]
        for name, title in TITLES.items():
            if name in summary["evaluations"][last]:
                value = summary["evaluations"][last][name]
                lines.append(f"| {title} | {value['mean']:.3f} | {value['standard_error']:.3f} |")
        lines.append("")
    lines.append("MiniLLM: Gu, Dong, Wei, Huang, ICLR 2024, arXiv 2306.08543.")
    return "\n".join(lines) + "\n"


def evaluation_text(result: dict[str, Any]) -> str:
    """The JSON of `minillm evaluate` as a table: means ± standard errors over prompts, [± deviations over seeds]."""
    rows = [["", "greedy", "sampled"]]
    for name, title in (("rouge_l", "ROUGE-L"), ("exact_match", "exact match, %")):
        sampled = result[name]["sampled"]
        deviation = f"  [± {sampled['standard_deviation']:.3f} over {len(sampled['by_seed'])} seeds]"
        rows.append([title, _pm(result[name]["greedy"]), _pm(sampled) + deviation])
    for name, part in result["by_reference_length"].items():
        if part["prompts"]:
            title = f"ROUGE-L, {part['prompts']} references of {name} tokens"
            rows.append([title, *(_pm(part[f"rouge_l/{way}"]) for way in ("greedy", "sampled"))])
    rows.append(["answer length, tokens", *(f"{result['length'][way]['mean']:.1f}" for way in ("greedy", "sampled"))])
    for n, value in result["distinct"].items():
        rows.append([f"distinct-{n}, %", "", number(value["mean"], 2)])
    rows.append(["", "references", "own samples"])
    rows.append(["loss, nats per token", _pm(result["loss"]), ""])
    if "reverse_kl" in result:
        reverse, forward = result["reverse_kl"], result["forward_kl"]
        rows.append(["reverse KL, nats per token", _pm(reverse["references"]), _pm(reverse["own_samples"])])
        rows.append(["forward KL, nats per token", _pm(forward["references"]), ""])
        bias = result["exposure_bias"]
        at = [i for i in range(len(bias["length"])) if i in (3, 15, 63, len(bias["length"]) - 1)]
        for i in at:
            value = f"{number(bias['exaccerr'][i], 1, sign=True)} ± {number(bias['standard_error'][i], 1)}"
            rows.append([f"ExAccErr at {bias['length'][i]} tokens, %", "", value])
    for name, part in result["calibration"].items():
        if part:
            title = f"calibration, {name.replace('_', ' ')}: ECE (accuracy)"
            rows.append([title, f"{part['ece']:.3f} ({part['accuracy']:.3f})", ""])
    rows.append(["greedy decoding", f"{result['tokens_per_second']:.0f} tokens per second", ""])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _pm(value: dict[str, Any], sign: bool = False) -> str:
    """Mean ± standard error, which one prompt alone does not have."""
    return f"{number(value['mean'], 3, sign)} ± {number(value['standard_error'], 3)}"


def number(value: float | None, digits: int, sign: bool = False) -> str:
    return "?" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
