"""A recipe from end to end: load, check, evaluate, run the stages, evaluate after each, export, sum up."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config.check import routes
from minillm.config.recipe import Recipe
from minillm.config.schema import ConfigError, RunConfig
from minillm.data.examples import Example, show
from minillm.doctor import examine, refuse
from minillm.doctor.patient import Finding
from minillm.evaluation.divergence import Author
from minillm.evaluation.measure import check_measurable, evaluation_set, measure
from minillm.evaluation.result import START, TEACHER, Evaluation, plain
from minillm.lost import ServerLost
from minillm.model.check import check_decoding, check_same_tokenizer
from minillm.model.head import CausalLM
from minillm.model.load import load_frozen, load_student, load_teacher, load_tokenizer, own_weights
from minillm.parallel.gathered import gathered
from minillm.parallel.shard import place_student, place_teacher, read_teacher
from minillm.parallel.whole import whole_model
from minillm.report.summary import card, changes, run_text
from minillm.run.directory import RunDirectory
from minillm.run.export import check_export
from minillm.run.workers import WorkerLost, resume_after_restart
from minillm.teacher import Teacher
from minillm.teacher.choose import choose_teacher
from minillm.teacher.own_base import own_teacher
from minillm.teacher.routed import Routed
from minillm.teacher.stored import StoredTeacher
from minillm.teacher.vllm_server import VllmTeacher
from minillm.terminal import say
from minillm.train.context import Context
from minillm.train.loop import train
from minillm.train.preflight import check_same_everywhere, prepare, space_needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = {
    "base": "the student's own base, without its adapters",
    "student": "the student itself, as it is at each step",
    "ema": "the moving average of the student",
}
PARTS = ("greedy", "samples", "references")
"""What is measured around the stages: enough to follow the objective, and quick."""


@dataclass(frozen=True)
class Run:
    """What a finished run left behind."""

    path: Path
    """The run directory."""
    summary: dict[str, Any]
    """What summary.json holds: stages with steps, tokens and seconds, evaluations, their changes, environment."""
    evaluations: dict[str, Evaluation]
    """Of the student at the `start` and after each stage, by the stage's name, then of the `teacher`; empty if the run
    did not evaluate."""

    @property
    def model_path(self) -> Path:
        """The student as a plain model directory, which `AutoModelForCausalLM.from_pretrained` loads."""
        return self.path / "model"


def run_recipe(
    recipe: Recipe, command: str = "", with_evaluation: bool = True, resume: str = "", doctor: bool = True
) -> Run:
    """Run every stage on one student.

    `command` is what the user typed; it goes into the summary and the model card, which otherwise name a command that
    repeats the run. `resume` is that of `RunDirectory`. Without `doctor`, the loss is not tried on the data first. All
    that can be wrong with the recipe, the models or the data is found before the first evaluation or step.
    """
    started, resume = time.perf_counter(), resume_after_restart(resume)
    if with_evaluation and not recipe.run.data.eval:
        raise ConfigError("data.eval is empty: distill evaluates before and after; `minillm train` does without")
    if with_evaluation and (reserved := {START, TEACHER} & recipe.stages.keys()):
        raise ConfigError(f"a stage is called {reserved.pop()!r}, the name of another evaluation: call it otherwise")
    student, loaded, tokenizer = load_pair(recipe.run)
    trainings = {name: prepare(recipe.run, stage, student, loaded, tokenizer) for name, stage in recipe.stages.items()}
    for name, training in trainings.items() if doctor else ():
        for context, _ in training.by_teacher(training.examples):
            refuse(name, context)
    teacher = None if isinstance(loaded, Routed) else loaded  # of several, none is the one to evaluate against
    examples = evaluation_set(recipe.run, tokenizer, recipe.training_sources) if with_evaluation else []
    if examples:
        check_measurable(student, judge(teacher), examples, recipe.run)
        for model in (student, teacher):
            if isinstance(model, CausalLM):
                check_decoding(model)
    check_same_everywhere(recipe, trainings, examples)
    check_export(student.model, tokenizer, recipe.run.lora.export)
    place_student(student, recipe.run.parallel, next(iter(trainings.values())).compute_dtype)
    with RunDirectory(recipe, resume, command, student.model, space_needed(recipe, student.model)) as run:
        try:
            return _run(run, student, teacher, tokenizer, trainings, examples, started)
        except ServerLost as lost:
            raise ServerLost(f"{lost}. {run.how_to_resume()}", lost.everywhere) from lost
        finally:
            if teacher is not None:
                teacher.close()


def _run(
    run: RunDirectory,
    student: CausalLM,
    teacher: Teacher | None,
    tokenizer: "PreTrainedTokenizerBase",
    trainings: Mapping[str, Context],
    examples: Sequence[Example],
    started: float,
) -> Run:
    """All that follows the checks."""
    recipe = run.recipe
    if not run.command:
        run.command = shlex.join(["minillm", "distill" if examples else "train", str(run.path / "config.yaml")])
    seconds = {"load": time.perf_counter() - started}
    _introduce(run, student, teacher, tokenizer, trainings)

    evaluations: dict[str, Evaluation] = {}

    def evaluate(name: str, model: Author, against: Teacher | None) -> None:
        if examples:
            evaluations[name] = _evaluated(name, run, model, against, tokenizer, examples)
            run.write("samples.jsonl", _samples(evaluations))

    if examples and isinstance(teacher, StoredTeacher):
        say(
            "the divergences are not measured: the teacher is stored, and was asked about nothing but what is learnt "
            f"from. Those along the references can be measured afterwards: minillm teach {teacher.plan.model} "
            f"--data {recipe.run.data.eval} --out DIR, then minillm evaluate {run.path / 'model'} --data "
            f"{recipe.run.data.eval} --teacher DIR"
        )
    if examples and isinstance(teacher, VllmTeacher):
        say("the teacher's own answers are not evaluated: vLLM gives its hidden states, and draws nothing here")
    evaluate(START, student, judge(teacher))
    step = 0
    for name, training in trainings.items():
        if name not in run.stages:  # else done before the checkpoint that was resumed from
            run.stages[name] = _trained(name, training, run, step)
            # before the evaluation: what was trained is kept, whatever follows
            run.export(whole_model(student), tokenizer)
        step += recipe.stages[name].optim.steps
        evaluate(name, student, judge(teacher))
    if isinstance(teacher, Author):
        evaluate(TEACHER, teacher, None)

    seconds |= _seconds(run.stages, evaluations)
    seconds["total"] = sum(seconds.values()) if run.resumed else time.perf_counter() - started
    summary = {
        "recipe": recipe.name,
        "command": run.command,
        "config_hash": recipe.digest(),
        "environment": run.environment,
        "teacher": _about(teacher) if teacher is not None else None,
        "student": _about(student),
        "stages": run.stages,
        "evaluations": {name: each.to_dict(per_prompt=False) for name, each in evaluations.items()},
        "changes": plain(changes(evaluations)),
        "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
    }
    run.write("model/README.md", card(recipe, run.command, evaluations))
    run.write("summary.json", summary)
    run.finish()
    say(run_text(evaluations, summary["seconds"]))
    say(f"\nmodel, metrics and summary.json are in {run.path}")
    return Run(run.path, summary, evaluations)


def diagnose(recipe: Recipe) -> dict[str, dict[str, Finding]]:
    """What `minillm doctor` finds on every stage, with its models as they are before the first of them."""
    pair = load_pair(recipe.run)
    trainings = {name: prepare(recipe.run, stage, *pair) for name, stage in recipe.stages.items()}
    return {
        f"{name}, teacher {context.route}" if context.route else name: examine(context)
        for name, training in trainings.items()
        for context, _ in training.by_teacher(training.examples)
    }


def load_pair(run: RunConfig) -> "tuple[CausalLM, Teacher | Routed | None, PreTrainedTokenizerBase]":
    """Student, teacher or teachers, and the tokenizer that they must share."""
    settings, own, named = run.model, own_weights(run), routes(run)
    placed = read_teacher(run) if settings.drop_layers is None and not own else None  # which cuts from a whole one
    loaded = load_teacher(run) if placed is None else None
    student = CausalLM(load_student(run, loaded), settings.head)
    tokenizer = load_tokenizer(settings.student or settings.teacher)
    if own:
        return student, own_teacher(student, own), tokenizer
    if named:
        for route in named.values():
            check_same_tokenizer(tokenizer, load_tokenizer(route.model))
        teachers = {name: CausalLM(load_frozen(r.model, run), settings.head) for name, r in named.items()}
        return student, Routed(teachers, named), tokenizer
    if loaded is not None:
        placed = CausalLM(loaded, settings.head)
        place_teacher(placed, run.parallel)
    return student, choose_teacher(run, placed, tokenizer), tokenizer


def judge(teacher: Teacher | None) -> Teacher | None:
    """The teacher as what a student's own text is compared with: one that is stored knows nothing of that."""
    return None if isinstance(teacher, StoredTeacher) else teacher


def _introduce(
    run: RunDirectory,
    student: CausalLM,
    teacher: Teacher | None,
    tokenizer: "PreTrainedTokenizerBase",
    trainings: Mapping[str, Context],
) -> None:
    """Say what is about to run, and show one example of what is learnt from."""

    def size(lm: CausalLM) -> str:
        layers, attention = getattr(lm.model.config, "num_hidden_layers", "?"), lm.model.config._attn_implementation
        return f"{lm.model.num_parameters() / 1e6:.1f}M parameters, {layers} layers, {attention}"

    own = own_weights(run.recipe.run)
    told = "" if teacher is None else f"teacher {size(teacher) if isinstance(teacher, CausalLM) else teacher}; "
    if own:
        told = f"teacher {OWN[own]}; "
    for several in {id(t.routed): t.routed for t in trainings.values() if t.routed is not None}.values():
        names = ", ".join(f"{name} {size(each)}" for name, each in several.teachers.items())  # type: ignore[arg-type]
        told = f"teachers {names}; "
    backends = ", ".join(name for name, state in run.environment["kernel_backends"].items() if state == "ok")
    say(f"{told}student {size(student)}; kernels: {backends}; writing {run.path}")
    for name, training in trainings.items():
        say(f"{name}: {training.about}")
    example = trainings[next(iter(trainings))].examples[0]
    text = show(example, tokenizer)
    say(f"one example, learnt from between the marks (minillm and gkd sample there):\n{text}", coloured=True)
    if run.resumed:
        say(f"resuming after step {run.resumed.progress.global_step} from {run.resumed.path}")


def _evaluated(
    name: str,
    run: RunDirectory,
    model: Author,
    teacher: Teacher | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
) -> Evaluation:
    """The evaluation of that name: the one that a resumed run has made before, else a new one."""
    file = f"evaluations/{name}.json"
    if run.resumed and (kept := run.read(file)):
        return Evaluation.from_dict(kept)
    say(f"evaluating ({name}) on {len(examples)} held-out prompts")
    parts = PARTS if teacher is not None else ("greedy",)
    with gathered(model, teacher):
        evaluation = measure(model, teacher, tokenizer, examples, run.recipe.run, parts)
    run.write(file, evaluation.to_dict())
    return evaluation


def _samples(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    return [
        {"stage": name, "prompt": each.prompt, "response": each.greedy}
        for name, evaluation in evaluations.items()
        for each in evaluation.responses
    ]


def _trained(name: str, training: Context, run: RunDirectory, step: int) -> dict[str, Any]:
    """Train a stage from `step`, or go on with it; returns what summary.json says of it."""
    resumed = run.resumed if run.resumed and run.resumed.progress.stage == name else None
    spent = resumed.progress.totals.get("step_time", 0.0) if resumed else 0.0
    began = time.perf_counter()
    try:
        totals = train(training, run, name, step, resumed)
    except RuntimeError as error:
        if not WorkerLost.caused(error):
            raise
        raise WorkerLost.of(error, run.how_to_resume()) from error
    stage = run.recipe.stages[name]
    taken = time.perf_counter() - began + spent
    return {"method": stage.method, "steps": stage.optim.steps, "seconds": taken, **totals}


def _seconds(stages: Mapping[str, dict[str, Any]], evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Where the time went, in the order of the run."""
    seconds: dict[str, float] = {}
    for name in (START, *stages, TEACHER):
        if name in stages:
            seconds[name] = stages[name]["seconds"]
        if name in evaluations:
            seconds[f"evaluation, {name}"] = sum(evaluations[name].seconds.values())
    return seconds


def _about(lm: Teacher) -> dict[str, Any]:
    if not isinstance(lm, CausalLM):
        return {"elsewhere": str(lm)}
    return {"parameters": lm.model.num_parameters(), "attention": lm.model.config._attn_implementation}
