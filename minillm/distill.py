"""A recipe from end to end: load, check, evaluate, run the stages, evaluate after each, export, sum up."""

import time
from typing import TYPE_CHECKING, Any

from minillm.config import ConfigError, Recipe
from minillm.evaluate import ROUGE, Evaluation, evaluate, held_out
from minillm.evaluate.rouge import greedy_answers, rouge_l
from minillm.models import check_same_tokenizer, load_model, load_student, load_tokenizer
from minillm.report import card, changes, report, samples
from minillm.run import Run
from minillm.train import prepare, train
from minillm.vocabulary import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START = "start"


def run_recipe(recipe: Recipe, command: str, with_evaluation: bool = True) -> dict[str, Any]:
    """Run every stage on one student; returns what is written to summary.json.

    All that can be wrong with the recipe, the models or the data is found before the first evaluation or step.
    """
    started = time.perf_counter()
    config = recipe.first
    if with_evaluation and not config.data.eval:
        raise ConfigError("data.eval is empty: distill evaluates before and after; `minillm train` does without")
    base = load_model(config.model.teacher, config.model.dtype) if config.model.teacher else None
    student = CausalLM(load_student(config, base), config.model.head)
    teacher = None if base is None else CausalLM(base, config.model.head)
    tokenizer = load_tokenizer(config.model.student or config.model.teacher)
    if config.model.student and config.model.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(config.model.teacher))
    trainings = {name: prepare(stage, student, teacher, tokenizer) for name, stage in recipe.stages.items()}
    examples = held_out(config, tokenizer) if with_evaluation else []
    run = Run(recipe)
    seconds = {"load": time.perf_counter() - started}
    print(headline(base, student.model, run), flush=True)

    evaluations: dict[str, Evaluation] = {}
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "command": command,
        "config_hash": recipe.digest(),
        "environment": run.environment,
        "teacher": {"parameters": teacher.model.num_parameters()} if teacher is not None else None,
        "student": {"parameters": student.model.num_parameters()},
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
        run.export(student.model, tokenizer)  # before the evaluation: what was trained is kept, whatever follows
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
    run.write("model/README.md", card(recipe, command, summary))
    seconds["total"] = time.perf_counter() - started
    summary["seconds"] = {phase: round(value, 1) for phase, value in seconds.items()}
    run.write("summary.json", summary)
    print(report(summary))
    print(f"\nmodel, metrics and summary.json are in {run.path}", flush=True)
    return summary


def headline(teacher: "PreTrainedModel | None", student: "PreTrainedModel", run: Run) -> str:
    """One line on what is about to run."""

    def size(model: "PreTrainedModel") -> str:
        layers = getattr(model.config, "num_hidden_layers", "?")
        return f"{model.num_parameters() / 1e6:.1f}M parameters, {layers} layers"

    teacher_size = f"teacher {size(teacher)}; " if teacher is not None else ""
    backends = ", ".join(name for name, state in run.environment["kernel_backends"].items() if state == "ok")
    return f"{teacher_size}student {size(student)}; kernels: {backends}; writing {run.path}"
