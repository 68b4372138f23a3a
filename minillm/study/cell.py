"""Run one cell of a study: train, evaluate, write its JSON. If it is stopped, the same command goes on with it.

Several runs of the command can share the cells of one study: each takes a cell that is ready and that no other run is
at.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import Timeout

import minillm
from minillm.config.recipe import Recipe
from minillm.config.schema import ModelConfig
from minillm.data.examples import Shuffled, encode, read_records
from minillm.evaluation.measure import evaluation_set, measure
from minillm.evaluation.result import START, TEACHER
from minillm.files import publish, read_lines, write_atomically
from minillm.model.head import CausalLM
from minillm.model.load import load_model, load_tokenizer
from minillm.run.directory import environment
from minillm.study.choice import budget, check_gate, choose, read
from minillm.study.plan import REFERENCE, Cell, Study
from minillm.terminal import say
from minillm.train.loop import METHODS
from minillm.train.preflight import prepare

KEPT = ("stage", "step", "loss", "kl/reverse", "reward/mean", "completions/mean_length", "entropy", "clip_fraction",
        "grad_norm", "loss/pt", "tokens_per_second")  # fmt: skip
VALIDATED = ("samples", "calibration")
"""Parts of an evaluation by which is chosen: ROUGE-L, and the loss."""
SAMPLED = ("minillm", "gkd")
"""Methods that learn from what the student samples."""


def run_next(study: Study, command: str) -> Path | None:
    """Run the first cell that can run now; None if other runs are at all of those.

    Raises ConfigError at the first cell of a method where the gate is not passed.
    """
    for cell in study.unfinished():
        if not all(study.result(needed).exists() for needed in study.needs(cell)):
            continue
        if cell.name not in (TEACHER, START):
            check_gate(study)
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
    record: dict[str, Any] = {"cell": cell._asdict(), "command": command, **trained(study, cell)}
    first = cell.seed == study.seeds[0]
    models = _load(study, cell), None if cell.name == TEACHER else _load(study, study.teacher)
    seconds = 0.0
    if first and "validation" not in record:
        record["validation"] = evaluated(study, cell, "validate", VALIDATED, models[0], None)
        seconds += sum(record["validation"]["seconds"].values())
    if not cell.candidate and (first or cell.name != START):
        record["evaluations"] = {x: evaluated(study, cell, x, parts, *models) for x, parts in study.parts.items()}
        seconds += sum(sum(found["seconds"].values()) for found in record["evaluations"].values())
    record["seconds"] = {"training": record["training"]["seconds"], "evaluation": seconds}
    record["environment"] = environment()
    target = study.result(cell)
    write_atomically(target, json.dumps(rounded(record), ensure_ascii=False) + "\n")
    _tidy(study, cell)
    return target


def evaluated(
    study: Study, cell: Cell, name: str, parts: Sequence[str], model: CausalLM, teacher: CausalLM | None
) -> dict[str, Any]:
    """What is measured of a model on a set of `evaluate`, or to choose by (`validate`). It is kept until the cell is
    done: one that is stopped goes on behind it."""
    config = study.evaluation(name)
    kept, asked = _kept(study, cell, name), json.dumps(asdict(config))
    if kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["asked"] == asked:
            return before["found"]
    tokenizer = load_tokenizer(str(study.model(cell)))
    examples = evaluation_set(config, tokenizer, [study.base["data"]["train"]])
    examples.sort(key=lambda example: len(example.prompt))  # a batch pads less; the same order for every model
    say(f"evaluating on {len(examples)} prompts ({name})")
    found = measure(model, teacher, tokenizer, examples, config, parts).to_dict()
    if name != "validate":
        found["reference_lengths"] = [len(example.response) for example in examples]
    write_atomically(kept, json.dumps({"asked": asked, "found": found}))
    return found


def trained(study: Study, cell: Cell) -> dict[str, Any]:
    """What was trained for a cell, whose model then is in `study.model(cell)`: a cell of the first seed takes over
    the candidate that was chosen."""
    chosen = "" if cell.candidate else choose(study, cell.name)
    candidate = Cell(cell.name, cell.seed, chosen)
    if not (chosen and candidate in study.candidates(cell.name)):
        return train(study, cell, chosen)
    if not study.model(cell).exists():
        if not study.model(candidate).exists():
            say(f"{candidate.path} has left no model here: trained again")
            train(study, candidate, "")
        study.model(cell).parent.mkdir(parents=True, exist_ok=True)
        publish(study.model(candidate), study.model(cell))
    kept = ("parameters", "config", "training", "metrics", "validation")
    return {key: value for key, value in read(study, candidate).items() if key in kept}


def train(study: Study, cell: Cell, chosen: str) -> dict[str, Any]:
    """Train a cell at the candidate `chosen`, where it is none itself, from its last checkpoint if it has one."""
    models = {TEACHER: [], START: [study.teacher]}.get(cell.name, [study.teacher, Cell(START, cell.seed)])
    for needed in models:
        with study.lock(needed.path):  # several cells may begin there at once
            if not study.model(needed).exists():
                say(f"{needed.path} has left no model here: trained again")  # only its JSON, as on another machine
                trained(study, needed)
    recipe = study.recipe(cell, chosen)
    stage = recipe.stages[cell.name]
    if stage.method == "seqkd":
        answer(study, recipe, cell.name)
    if study.matched(cell.name):
        recipe = study.recipe(cell, chosen, _steps(study, recipe, cell))
    folder = study.work / cell.path
    if not (folder / "summary.json").exists():
        minillm.distill(recipe, resume="auto")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]
    done, size = recipe.stages[cell.name].optim.steps, stage.optim.batch_size
    if stage.method in SAMPLED:
        learnt = size * sum(row["completions/mean_length"] for row in rows)
    else:
        responses = _responses(study, recipe, cell.name)
        learnt = sum(responses[i] for i in Shuffled(len(responses), cell.seed).take(0, done * size))
    return {
        "parameters": summary["student"]["parameters"],
        "config": recipe.to_dict(),
        "training": {**summary["stages"][cell.name], "response_tokens": learnt},
        "metrics": [{key: row[key] for key in KEPT if key in row} for row in rows],
    }


def answer(study: Study, recipe: Recipe, stage: str) -> None:
    """Sample the teacher's answers to the training prompts, which seqkd learns from, once for all seeds."""
    with study.lock(study.answers.stem):
        if not study.answers.exists():
            teacher, tokenizer = _load(study, study.teacher), load_tokenizer(str(study.model(study.teacher)))
            METHODS["seqkd"](prepare(recipe.run, recipe.stages[stage], teacher, teacher, tokenizer), study.work)


def steps_to_reach(budget: float, tokens: Sequence[int], seed: int, batch_size: int) -> int:
    """The fewest steps whose responses have at least `budget` tokens: of examples with these numbers of tokens, in
    the order that training takes them."""
    order, steps, seen = Shuffled(len(tokens), seed), 0, 0
    while seen < budget:
        seen += sum(tokens[i] for i in order.take(steps * batch_size, batch_size))
        steps += 1
    return steps


def _steps(study: Study, recipe: Recipe, cell: Cell) -> int:
    """Steps that reach minillm's response tokens; where the student samples, at the length of its answers there."""
    tokens, size = budget(study, cell.seed), recipe.stages[cell.name].optim.batch_size
    if recipe.stages[cell.name].method not in SAMPLED:
        return steps_to_reach(tokens, _responses(study, recipe, cell.name), cell.seed, size)
    (held,) = [c for c in study.held_to(cell.seed) if c.candidate in ("", choose(study, REFERENCE))]
    lengths = [row["completions/mean_length"] for row in read(study, held)["metrics"]]
    return math.ceil(tokens / (size * fmean(lengths)))


def _responses(study: Study, recipe: Recipe, stage: str) -> list[int]:
    """Tokens of the responses that a method learns from, per example."""
    config = recipe.stages[stage]
    if config.method == "seqkd":
        return [len(json.loads(line)["token_ids"]) for line in read_lines(study.answers)]
    tokenizer, data = load_tokenizer(study.base["model"]["teacher"]), config.data
    encoded = encode(read_records(data.train), tokenizer, recipe.run.data, data, data.train, answers=True)
    return [len(example.response) for example in encoded.examples]


def _load(study: Study, cell: Cell) -> CausalLM:
    return CausalLM(load_model(str(study.model(cell)), ModelConfig().dtype))


def _kept(study: Study, cell: Cell, name: str) -> Path:
    return study.work / cell.path / f"{name}.json"


def _tidy(study: Study, cell: Cell) -> None:
    """Delete what nothing needs any more: gigabytes in all. Others need the models of the teacher and the starts, and
    those of candidates until one of them is chosen."""
    for name in ("validate", *study.parts):
        _kept(study, cell, name).unlink(missing_ok=True)
    folders = [study.work / each.path for each in study.candidates(cell.name)] if not cell.candidate else []
    folders.append(study.work / cell.path / ("checkpoints" if cell.name in (TEACHER, START) or cell.candidate else ""))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def rounded(tree: Any) -> Any:
    """Floats with six digits, so that the committed JSON stays small and readable."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [rounded(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree
