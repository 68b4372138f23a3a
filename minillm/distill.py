"""A recipe from end to end: load, check, evaluate, run the stages, evaluate after each, export, sum up."""

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from minillm.config import Config, ConfigError, Recipe
from minillm.data import Example
from minillm.evaluate import OWN, REFERENCES, ROUGE, Evaluation, evaluate, held_out
from minillm.evaluate.estimate import difference
from minillm.evaluate.rouge import greedy_answers, rouge_l
from minillm.models import check_same_tokenizer, load_model, load_student, load_tokenizer
from minillm.run import Run, duration
from minillm.train import prepare, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START = "start"
TITLES = {OWN: "reverse KL, own samples", REFERENCES: "reverse KL, references", ROUGE: "ROUGE-L"}


def run_recipe(recipe: Recipe, command: str, with_evaluation: bool = True) -> dict[str, Any]:
    """Run every stage on one student; returns what is written to summary.json.

    All that can be wrong with the recipe, the models or the data is found before the first evaluation or step.
    """
    started = time.perf_counter()
    config = recipe.first
    if with_evaluation and not config.data.eval:
        raise ConfigError("data.eval is empty: distill evaluates before and after; `minillm train` does without")
    teacher = load_model(config.model.teacher, config.model.dtype) if config.model.teacher else None
    student = load_student(config, teacher)
    tokenizer = load_tokenizer(config.model.student or config.model.teacher)
    if config.model.student and config.model.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(config.model.teacher))
    trainings = {name: prepare(stage, student, teacher, tokenizer) for name, stage in recipe.stages.items()}
    examples = held_out(config, tokenizer) if with_evaluation else []
    run = Run(recipe)
    seconds = {"load": time.perf_counter() - started}
    print(headline(teacher, student, run), flush=True)

    evaluations: dict[str, Evaluation] = {}
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "command": command,
        "config_hash": recipe.digest(),
        "environment": run.environment,
        "teacher": {"parameters": teacher.num_parameters()} if teacher is not None else None,
        "student": {"parameters": student.num_parameters()},
        "stages": {},
    }

    def measure(stage: str) -> None:
        if with_evaluation:
            print(f"evaluating ({stage}) on {len(examples)} held-out prompts", flush=True)
            evaluations[stage] = evaluate(student, teacher, tokenizer, examples, config)
            seconds[f"evaluation, {stage}"] = sum(evaluations[stage].seconds.values())
            for example, answer in zip(examples[: config.log.samples], evaluations[stage].answers, strict=False):
                run.sample({"stage": stage, "prompt": example.record.prompt, "answer": answer})

    measure(START)
    step = 0
    for name, training in trainings.items():
        stage = recipe.stages[name]
        began = time.perf_counter()
        totals = train(training, run, name, step)
        seconds[name] = time.perf_counter() - began
        step += stage.optim.steps
        summary["stages"][name] = {"method": stage.method, "steps": stage.optim.steps, **totals}
        measure(name)

    teacher_answers: list[str] = []
    if with_evaluation and teacher is not None:
        began = time.perf_counter()
        prompts = [example.prompt for example in examples]
        teacher_answers = greedy_answers(
            teacher, tokenizer, prompts, config.eval.rouge_new_tokens, config.eval.batch_size
        )
        score = rouge_l(teacher_answers, [example.record.answer or "" for example in examples])
        summary["teacher"][ROUGE] = score.to_dict()
        seconds["evaluation, teacher"] = time.perf_counter() - began
    summary["evaluations"] = {
        stage: {**{k: e.to_dict() for k, e in result.estimates.items()}, "seconds": result.seconds}
        for stage, result in evaluations.items()
    }
    summary["changes"] = changes(evaluations)
    summary["samples"] = samples(examples[: config.log.samples], evaluations, teacher_answers)
    run.export(student, tokenizer, card(recipe, command, summary))
    seconds["total"] = time.perf_counter() - started
    summary["seconds"] = {phase: round(value, 1) for phase, value in seconds.items()}
    run.write_json("summary.json", summary)
    print(report(summary))
    print(f"\nmodel, metrics and summary.json are in {run.path}", flush=True)
    return summary


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


def headline(teacher: "PreTrainedModel | None", student: "PreTrainedModel", run: Run) -> str:
    """One line on what is about to run."""

    def size(model: "PreTrainedModel") -> str:
        layers = getattr(model.config, "num_hidden_layers", "?")
        return f"{model.num_parameters() / 1e6:.1f}M parameters, {layers} layers"

    teacher_size = f"teacher {size(teacher)}; " if teacher is not None else ""
    backends = ", ".join(name for name, state in run.environment["kernel_backends"].items() if state == "ok")
    return f"{teacher_size}student {size(student)}; kernels: {backends}; writing {run.path}"


def card(recipe: Recipe, command: str, summary: dict[str, Any]) -> str:
    """Model card: where the model comes from, how it was made, what was measured."""
    config: Config = recipe.first
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
