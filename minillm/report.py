"""What a run amounts to: paired changes, the table on the terminal, the model card. Everything from summary.json."""

from itertools import pairwise
from typing import Any

from minillm.data import Example
from minillm.evaluate import OWN, REFERENCES, ROUGE, Evaluation
from minillm.evaluate.estimate import difference
from minillm.recipe import Recipe
from minillm.run import duration

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
        lines += ["", f"prompt: {sample['prompt']}"]
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
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    times = ", ".join(f"{phase} {duration(value)}" for phase, value in summary["seconds"].items())
    return "\n".join([*lines, "", f"time: {times}"])


def card(recipe: Recipe, command: str, summary: dict[str, Any]) -> str:
    """Model card: where the model comes from, how it was made, what was measured."""
    config = recipe.first
    origin = config.model.student or (
        f"{config.model.teacher} without its layers [{config.model.drop_layers[0]}, {config.model.drop_layers[1]})"
        if config.model.drop_layers
        else config.model.teacher
    )
    methods = ", then ".join(stage.method for stage in recipe.stages.values())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [distillation, minillm]",
        "---",
        f"# {recipe.name}",
        "",
        f"Student: {origin}. Teacher: {config.model.teacher or 'none'}. Method: {methods}.",
        f"Data: {config.data.train}; text: {config.data.text or 'none'}. The licences of the teacher and data apply.",
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


def _pm(value: dict[str, float], sign: bool = False) -> str:
    return f"{value['mean']:{'+' if sign else ''}.3f} ± {value['standard_error']:.3f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
