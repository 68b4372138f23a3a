"""Run one cell of a study: train, evaluate, write its JSON. If it is stopped, the same command goes on with it.

Several runs of the command can share the cells of one study: each takes a cell that is ready and that no other run is
at.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

import minillm
from minillm.config.recipe import Recipe
from minillm.config.schema import ModelConfig
from minillm.data.examples import Example, Shuffled, encode, read_records
from minillm.evaluation.measure import evaluation_set, measure
from minillm.files import read_lines, write_atomically
from minillm.model.head import CausalLM
from minillm.model.load import load_model, load_tokenizer
from minillm.run.directory import environment
from minillm.study.plan import REFERENCE, START, TEACHER, Cell, Study
from minillm.terminal import say
from minillm.train.loop import METHODS
from minillm.train.preflight import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = ("stage", "step", "loss", "kl/reverse", "reward/mean", "completions/mean_length", "entropy", "clip_fraction",
        "grad_norm", "loss/pt", "tokens_per_second")  # fmt: skip


def run_next(study: Study, command: str) -> Path | None:
    """Run the first cell that can run now; None if other runs are at all of those."""
    for cell in study.unfinished():
        if not all(study.result(needed).exists() for needed in study.needs(cell)):
            continue
        try:
            held = study.lock(cell.path).acquire(blocking=False)
        except Timeout:
            continue
        with held:
            if not study.result(cell).exists():  # done by another run meanwhile
                say(f"== {cell.path}")
                return run_cell(study, cell, command)
    return None


def run_cell(study: Study, cell: Cell, command: str) -> Path:
    """Returns the path of the JSON written. Asked to stop by a signal, raises Interrupted after a checkpoint."""
    started = time.perf_counter()
    record: dict[str, Any] = {"cell": cell._asdict(), "command": command}
    if cell.name == TEACHER:
        answer(study)
        source = study.base["model"]["teacher"]
    else:
        record |= train(study, cell)
        source = str(study.work / cell.path / "model")
    trained = time.perf_counter()
    record |= evaluations(study, source, cell.name != TEACHER)
    spent = record["training"]["seconds"] if "training" in record else trained - started  # over all resumptions
    record["seconds"] = {"training": spent, "evaluation": time.perf_counter() - trained}
    record["environment"] = environment()
    target = study.result(cell)
    write_atomically(target, json.dumps(rounded(record), ensure_ascii=False) + "\n")
    if cell.name != TEACHER:  # gigabytes in all; other cells need nothing but the model of `start`
        shutil.rmtree(study.work / cell.path / ("checkpoints" if cell.name == START else ""), ignore_errors=True)
    return target


def train(study: Study, cell: Cell) -> dict[str, Any]:
    """Train a cell, from its last checkpoint if it has one.

    The model that it begins from is trained again if only the JSON of that cell is here, as on another machine.
    """
    start = Cell(cell.size, START, cell.seed)
    if cell != start:
        with study.lock(start.path):  # several cells may begin there at once
            if not (study.work / start.path / "model").exists():
                say(f"{start.path} has left no model here: trained again")
                train(study, start)
    recipe = study.recipe(cell)
    if recipe.stages[cell.name].method == "seqkd":
        answer(study)
    if study.matched(cell):
        reference = study.result(Cell(cell.size, REFERENCE, cell.seed))
        budget = json.loads(reference.read_text(encoding="utf-8"))["training"]["num_tokens"]
        batch_size = recipe.stages[cell.name].optim.batch_size
        steps = steps_to_reach(budget, lengths(study, recipe, cell.name), cell.seed, batch_size)
        recipe = study.recipe(cell, steps)
    folder = study.work / cell.path
    if not (folder / "summary.json").exists():
        minillm.distill(recipe, resume="auto")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]
    return {
        "parameters": summary["student"]["parameters"],
        "config": recipe.to_dict(),
        "training": summary["stages"][cell.name],
        "metrics": [{key: row[key] for key in KEPT if key in row} for row in rows],
    }


def steps_to_reach(budget: float, tokens: Sequence[int], seed: int, batch_size: int) -> int:
    """The fewest steps whose sequences, prompts included, have at least `budget` tokens: of examples with these
    numbers of tokens, in the order that training takes them."""
    order, steps, seen = Shuffled(len(tokens), seed), 0, 0
    while seen < budget:
        seen += sum(tokens[i] for i in order.take(steps * batch_size, batch_size))
        steps += 1
    return steps


def lengths(study: Study, recipe: Recipe, stage: str) -> list[int]:
    """Tokens of the sequences that a method learns from, per example."""
    examples = examples_of(recipe, stage, load_tokenizer(recipe.run.model.teacher))
    responses = [example.response for example in examples]
    if recipe.stages[stage].method == "seqkd":
        responses = [json.loads(line)["token_ids"] for line in read_lines(study.answers)]
    return [len(e.prompt) + len(response) for e, response in zip(examples, responses, strict=True)]


def examples_of(recipe: Recipe, stage: str, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    method, data = recipe.stages[stage].method, recipe.stages[stage].data
    answers = method not in ("minillm", "seqkd")
    return encode(read_records(data.train), tokenizer, recipe.run.data, data, data.train, answers).examples


def answer(study: Study) -> None:
    """Sample the teacher's answers to the training prompts, which seqkd learns from, once for all seeds."""
    seqkd = [name for name, tree in study.methods.items() if tree.get("method") == "seqkd"]
    with study.lock(study.answers.stem):
        if seqkd and not study.answers.exists():
            size = next(iter(study.sizes))
            recipe = study.recipe(Cell(size, seqkd[0], 0))
            source = recipe.run.model.teacher
            teacher = CausalLM(load_model(source))
            training = prepare(recipe.run, recipe.stages[seqkd[0]], teacher, teacher, load_tokenizer(source))
            METHODS["seqkd"](training, study.work)


def evaluations(study: Study, source: str, against_teacher: bool) -> dict[str, Any]:
    """Evaluate one model on every data set of the study; everything on the first, samples alone on the others."""
    teacher_source = study.base["model"]["teacher"]
    tokenizer, settings = load_tokenizer(source), ModelConfig()
    model = CausalLM(load_model(source, settings.dtype))
    teacher = CausalLM(load_model(teacher_source, settings.dtype)) if against_teacher else None
    found: dict[str, Any] = {}
    for i, name in enumerate(study.evaluate):
        config = study.evaluation(name)
        examples = evaluation_set(config, tokenizer, [study.base["data"]["train"]])
        say(f"evaluating on {len(examples)} prompts of {config.data.eval}")
        if i == 0:
            evaluation = measure(model, teacher, tokenizer, examples, config)
        else:
            examples.sort(key=lambda example: len(example.prompt))  # less padding in a batch
            evaluation = measure(model, None, tokenizer, examples, config, ["samples"])
        found[name] = evaluation.to_dict(per_prompt=False)
    return {"evaluations": found}


def rounded(tree: Any) -> Any:
    """Floats with six digits, so that the committed JSON stays small and readable."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [rounded(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree
