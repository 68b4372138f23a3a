"""A recipe from end to end: load, check, evaluate, run the stages, evaluate after each, export, sum up."""

import time
from typing import TYPE_CHECKING, Any

from minillm.config.recipe import Recipe
from minillm.config.schema import ConfigError, RunConfig
from minillm.data.examples import show
from minillm.evaluate import ROUGE, Evaluation, evaluate, evaluation_set
from minillm.evaluate.rouge import greedy_answers, rouge_l
from minillm.model.head import CausalLM
from minillm.model.load import check_same_tokenizer, load_student, load_teacher, load_tokenizer
from minillm.report.summary import card, changes, report, samples
from minillm.run.directory import RunDirectory
from minillm.train.loop import prepare, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = "start"


def run_recipe(recipe: Recipe, command: str, with_evaluation: bool = True, resume: str = "") -> dict[str, Any]:
    """Run every stage on one student; returns what is written to summary.json. `resume` as of `RunDirectory`.

    All that can be wrong with the recipe, the models or the data is found before the first evaluation or step.
    """
    started = time.perf_counter()
    config = recipe.run
    if with_evaluation and not config.data.eval:
        raise ConfigError("data.eval is empty: distill evaluates before and after; `minillm train` does without")
    student, teacher, tokenizer = load_pair(config)
    trainings = {name: prepare(config, stage, student, teacher, tokenizer) for name, stage in recipe.stages.items()}
    examples = evaluation_set(config, tokenizer, recipe.training_sources) if with_evaluation else []
    run = RunDirectory(recipe, resume, command)
    seconds = {"load": time.perf_counter() - started}
    print(headline(teacher, student, run), flush=True)
    for name, training in trainings.items():
        print(f"{name}: {training.about}")
    example = trainings[next(iter(trainings))].examples[0]
    print(f"one example, learnt from between ⟦ and ⟧ (minillm and gkd sample there):\n{show(example, tokenizer)}")
    if run.resumed:
        print(f"resuming after step {run.resumed.progress.global_step} from {run.resumed.path}", flush=True)

    evaluations: dict[str, Evaluation] = {}
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "command": command,
        "config_hash": recipe.digest(),
        "environment": run.environment,
        "teacher": about(teacher) if teacher is not None else None,
        "student": about(student),
        "stages": run.stages,
    }

    def measure(stage: str) -> None:
        if with_evaluation:
            file = f"evaluations/{stage}.json"
            kept = run.read(file) if run.resumed else None
            if kept:
                evaluations[stage] = Evaluation.from_dict(kept)
            else:
                print(f"evaluating ({stage}) on {len(examples)} held-out prompts", flush=True)
                evaluations[stage] = evaluate(student, teacher, tokenizer, examples, config)
                run.write(file, evaluations[stage].to_dict())
                for example, answer in zip(examples[: config.log.samples], evaluations[stage].answers, strict=False):
                    run.sample({"stage": stage, "prompt": example.record.prompt, "answer": answer})
            seconds[f"evaluation, {stage}"] = sum(evaluations[stage].seconds.values())

    measure(START)
    step = 0
    for name, training in trainings.items():
        stage = recipe.stages[name]
        if name not in run.stages:  # else done before the checkpoint that was resumed from
            resumed = run.resumed if run.resumed and run.resumed.progress.stage == name else None
            spent = resumed.progress.totals.get("step_time", 0.0) if resumed else 0.0
            began = time.perf_counter()
            try:
                totals = train(training, run, name, step, resumed)
            except RuntimeError as error:
                if not WorkerLost.caused(error):
                    raise
                raise WorkerLost.of(error, run) from error
            taken = time.perf_counter() - began + spent
            run.stages[name] = {"method": stage.method, "steps": stage.optim.steps, "seconds": taken, **totals}
            run.export(student.model, tokenizer)  # before the evaluation: what was trained is kept, whatever follows
        seconds[name] = run.stages[name]["seconds"]
        step += stage.optim.steps
        measure(name)

    teacher_answers: list[str] = []
    if with_evaluation and teacher is not None:
        began = time.perf_counter()
        prompts = [example.prompt for example in examples]
        teacher_answers = greedy_answers(
            teacher, tokenizer, prompts, config.eval.greedy_tokens, config.eval.batch_size
        )
        score = rouge_l(teacher_answers, [example.record.references for example in examples])
        summary["teacher"][ROUGE] = score.to_dict()
        seconds["evaluation, teacher"] = time.perf_counter() - began
    summary["evaluations"] = {
        stage: {**{k: e.to_dict() for k, e in result.estimates.items()}, "seconds": result.seconds}
        for stage, result in evaluations.items()
    }
    summary["changes"] = changes(evaluations)
    summary["samples"] = samples(examples[: config.log.samples], evaluations, teacher_answers)
    run.write("model/README.md", card(recipe, command, summary))
    seconds["total"] = sum(seconds.values()) if run.resumed else time.perf_counter() - started
    summary["seconds"] = {phase: round(value, 1) for phase, value in seconds.items()}
    run.write("summary.json", summary)
    run.finish()
    print(report(summary))
    print(f"\nmodel, metrics and summary.json are in {run.path}", flush=True)
    return summary


class WorkerLost(RuntimeError):
    """Another process of a distributed run has ended, and this one cannot go on without it."""

    @staticmethod
    def caused(error: RuntimeError) -> bool:
        """Gloo and NCCL have no exception of their own for it."""
        words = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
        return any(word in str(error) for word in words)

    @classmethod
    def of(cls, error: RuntimeError, run: RunDirectory) -> "WorkerLost":
        first = str(error).strip().partition("\n")[0][:200]
        return cls(f"another process of this run has ended ({first}); its own output says why. {run.how_to_resume()}")


def about(lm: CausalLM) -> dict[str, Any]:
    """What summary.json says of a model."""
    return {"parameters": lm.model.num_parameters(), "attention": lm.model.config._attn_implementation}


def load_pair(run: RunConfig) -> "tuple[CausalLM, CausalLM | None, PreTrainedTokenizerBase]":
    """Student, teacher and the tokenizer that they must share."""
    settings, base = run.model, load_teacher(run)
    student = CausalLM(load_student(run, base), settings.head)
    tokenizer = load_tokenizer(settings.student or settings.teacher)
    if settings.student and settings.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(settings.teacher))
    return student, None if base is None else CausalLM(base, settings.head), tokenizer


def headline(teacher: CausalLM | None, student: CausalLM, run: RunDirectory) -> str:
    """One line on what is about to run."""

    def size(lm: CausalLM) -> str:
        layers, attention = getattr(lm.model.config, "num_hidden_layers", "?"), lm.model.config._attn_implementation
        return f"{lm.model.num_parameters() / 1e6:.1f}M parameters, {layers} layers, {attention}"

    teacher_size = f"teacher {size(teacher)}; " if teacher is not None else ""
    backends = ", ".join(name for name, state in run.environment["kernel_backends"].items() if state == "ok")
    return f"{teacher_size}student {size(student)}; kernels: {backends}; writing {run.path}"
