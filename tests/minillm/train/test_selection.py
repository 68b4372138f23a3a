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
    """The second of three validations is made the best; the student ends with the weights it had then."""
    context, run = stage(files, make_tokenizer, name, "--validation.every=2", "--optim.steps=6")
    scores, seen = iter([sign * 1.0, sign * 3.0, sign * 2.0]), []

    def score(self, *rest):
        seen.append([p.detach().clone() for p in context.student.parameters()])
        return next(scores)

    monkeypatch.setattr(Selection, "_loss" if sign < 0 else "_rouge", score)
    result = train(context, run, name)
    assert (result["best_step"], result["best_score"]) == (4, sign * 3.0)
    for a, b in zip(context.student.parameters(), seen[1], strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(b, last) for b, last in zip(seen[1], seen[2], strict=True))
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
