"""A stage ends with the weights of its best validation, on prompts neither trained on nor tested on."""

import json

import pytest
import torch

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.evaluation.measure import evaluation_set
from minillm.evaluation.text import rouge_l
from minillm.model.head import CausalLM
from minillm.model.load import load_model
from minillm.model.sampling import greedy_responses
from minillm.run.directory import RunDirectory
from minillm.train.loop import train
from minillm.train.minillm import MiniLLM
from minillm.train.preflight import prepare
from minillm.train.selection import Selection


def stage(files, make_tokenizer, name, *flags):
    recipe = load_recipe(files / "recipe.yaml", [f"--output={files / 'selected'}", *flags])
    student, teacher = (CausalLM(load_model(s)) for s in (recipe.run.model.student, recipe.run.model.teacher))
    return prepare(recipe.run, recipe.stages[name], student, teacher, make_tokenizer()), RunDirectory(recipe)


def metrics(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "metric", "sign"), [("warm-up", "validation/loss", -1), ("minillm", "validation/rouge_l", 1)]
)
def test_the_best_validation_wins(files, make_tokenizer, monkeypatch, name, metric, sign):
    """The second validation in training is made the best; the student ends with the weights it had then."""
    context, run = stage(files, make_tokenizer, name, "--validation.every=2", "--optim.steps=6")
    scores, seen = iter([sign * 0.5, sign * 1.0, sign * 3.0, sign * 2.0]), []  # the first before the first step

    def score(self, *rest):
        seen.append([p.detach().clone() for p in context.student.parameters()])
        return next(scores)

    monkeypatch.setattr(Selection, "_loss" if sign < 0 else "_rouge", score)
    result = train(context, run, name)
    assert (result["best_step"], result["best_score"]) == (4, sign * 3.0)
    for a, b in zip(context.student.parameters(), seen[2], strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(b, last) for b, last in zip(seen[2], seen[3], strict=True))
    assert {row["step"]: row.get(metric) for row in metrics(run)} == {
        1: None, 2: sign * 1.0, 3: None, 4: sign * 3.0, 5: None, 6: sign * 2.0,
    }  # fmt: skip


def test_the_scores_are_loss_and_rouge(files, make_tokenizer):
    flags = [f"--validation.data={files / 'eval.jsonl'}", "--validation.every=1", "--optim.steps=2"]
    flags.append("--validation.greedy_tokens=4")
    context, run = stage(files, make_tokenizer, "warm-up", *flags, "--method=sft", "--optim.lr=0")
    train(context, run, "warm-up")
    total = count = 0.0
    for example in context.validation:
        ids = torch.tensor([example.prompt + example.response])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        with torch.no_grad():
            total += float(context.student.model(ids, labels=labels).loss) * len(example.response)
        count += len(example.response)
    assert metrics(run)[0]["validation/loss"] == pytest.approx(total / count, rel=1e-5)

    context, run = stage(files, make_tokenizer, "minillm", *flags, "--optim.lr=0", f"--output={files / 'other'}")
    responses = greedy_responses(
        context.student, context.tokenizer, [e.prompt for e in context.validation], 4, 64, [0]
    )
    expected = rouge_l(responses, [example.record.answer for example in context.validation]).mean
    selection = Selection(context, MiniLLM(context, files), files)
    assert selection._rouge() == pytest.approx(expected)


def test_prompts_are_held_out_of_training_and_the_same_for_every_method(files, make_tokenizer):
    flags = ("--validation.every=1", "--optim.steps=3")
    sets = []
    for name in ("warm-up", "minillm"):
        context, _ = stage(files, make_tokenizer, name, *flags, f"--output={files / name}")
        prompts = {e.record.prompt for e in context.validation}
        assert prompts and not prompts & {e.record.prompt for e in context.examples}
        assert len(context.validation) + len(context.examples) == 14
        assert "1 for validation" in context.about
        sets.append(prompts)
    assert sets[0] == sets[1]


def test_validation_prompts_are_never_tested_on(files, make_tokenizer):
    lines = (files / "eval.jsonl").read_text().splitlines(keepends=True)
    (files / "validation.jsonl").write_text("".join(lines[:2]))
    recipe = load_recipe(
        files / "recipe.yaml", [f"--validation.data={files / 'validation.jsonl'}", "--eval.prompts=4"]
    )
    examples = evaluation_set(recipe.run, make_tokenizer(), recipe.training_sources)
    tested = {example.record.prompt for example in examples}
    assert len(tested) == 4
    assert not tested & {json.loads(line)["instruction"] for line in lines[:2]}


def test_too_few_examples_and_short_stages(files, make_tokenizer):
    (files / "train.jsonl").write_text("".join((files / "train.jsonl").open().readlines()[:9]))
    with pytest.raises(ConfigError, match=r"has 9 prompts with answers, too few.*name validation.data, or set"):
        stage(files, make_tokenizer, "warm-up", "--validation.every=1")
    context, _ = stage(files, make_tokenizer, "warm-up", "--validation.every=3")  # a stage of 3 steps
    assert context.validation == []


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([5.0, 3.0, 4.0, 2.0], 0),  # training made it worse
        ([float("nan"), 1.0, 2.0, float("nan")], 4),  # what is not finite never wins, nor stays
        ([0.0, 0.0, 0.0, 0.0], 6),  # a metric that cannot tell undoes nothing
        ([float("nan")] * 4, None),
    ],
)
def test_which_weights_a_stage_ends_with(files, make_tokenizer, monkeypatch, scores, best):
    context, run = stage(files, make_tokenizer, "minillm", "--validation.every=2", "--optim.steps=6")
    values, seen = iter(scores), []

    def score(self, *rest):
        seen.append([p.detach().clone() for p in context.student.parameters()])
        return next(values)

    monkeypatch.setattr(Selection, "_rouge", score)
    result = train(context, run, "minillm")
    assert result.get("best_step") == best
    expected = seen[best // 2] if best is not None else seen[-1]
    assert all(torch.equal(a, b) for a, b in zip(context.student.parameters(), expected, strict=True))


def test_the_best_weights_of_a_kept_checkpoint_stay(files, make_tokenizer, monkeypatch):
    """Resumed from a checkpoint before the last best, a run needs the best that this checkpoint knows."""
    flags = ["--validation.every=2", "--optim.steps=6", "--log.checkpoint_every=2", "--log.checkpoints_kept=1"]
    context, run = stage(files, make_tokenizer, "minillm", *flags)
    scores = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(Selection, "_rouge", lambda self: next(scores))
    kept = []
    forget = Selection.forget
    monkeypatch.setattr(Selection, "forget", lambda self, steps: (kept.append(set(steps)), forget(self, steps)))
    train(context, run, "minillm")
    assert kept == [{2}, {4}, {6}]
    assert [path.name for path in (run.path / "stages" / "minillm").glob("best-*")] == ["best-6.safetensors"]

    context, run = stage(
        files, make_tokenizer, "minillm", *flags, f"--output={files / 'two'}", "--log.checkpoints_kept=2"
    )
    scores = iter([0.0, 1.0, 2.0, 3.0])
    train(context, run, "minillm")
    names = sorted(path.name for path in (run.path / "stages" / "minillm").glob("best-*"))
    assert names == ["best-4.safetensors", "best-6.safetensors"]
