import math

import pytest
import torch

from minillm.config.recipe import load_recipe
from minillm.config.schema import DataConfig, EvalConfig
from minillm.data.examples import DataError, encode, read_records
from minillm.evaluate import evaluate, evaluation_set
from minillm.evaluate.divergence import own_samples, references
from minillm.evaluate.means import Estimate, difference
from minillm.model.head import CausalLM


def estimate(totals, counts):
    return Estimate(torch.tensor(totals, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def test_equal_counts_give_the_usual_standard_error():
    values = [1.0, 2.0, 4.0, 5.0]
    found = estimate([3 * v for v in values], [3.0] * 4)
    assert found.mean == pytest.approx(3.0)
    assert found.standard_error == pytest.approx(torch.tensor(values).std().item() / 2)


def test_standard_error_of_a_ratio_against_resampling():
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (200,), generator=g).double()
    totals = counts * (1 + 0.3 * torch.randn(200, generator=g, dtype=torch.float64)) + torch.rand(200, generator=g)
    found = Estimate(totals, counts)
    picks = torch.randint(200, (4000, 200), generator=g)
    bootstrap = (totals[picks].sum(1) / counts[picks].sum(1)).std().item()
    assert found.standard_error == pytest.approx(bootstrap, rel=0.1)


def test_pairing_removes_what_the_prompts_share():
    before = estimate([1.0, 5.0, 9.0, 2.0], [1.0] * 4)
    after = estimate([0.5, 4.5, 8.5, 1.5], [1.0] * 4)
    change = difference(after, before)
    assert change["mean"] == pytest.approx(-0.5)
    assert change["standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert before.standard_error > 1
    with pytest.raises(ValueError, match="the same prompts"):
        difference(after, estimate([1.0], [1.0]))


def test_one_prompt_has_no_standard_error():
    assert math.isnan(estimate([1.0], [2.0]).standard_error)


@pytest.fixture
def world(files, make_llama, tokenizer):
    config = load_recipe(files / "recipe.yaml").run
    examples = encode(read_records(config.data.eval), tokenizer, config.data, DataConfig(), "eval").examples
    return config, CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4)), tokenizer, examples


@torch.no_grad()
def test_divergences_on_references_against_plain_torch(world):
    _, student, teacher, _, examples = world
    reverse, forward = references(student, teacher, examples, EvalConfig(batch_size=8))
    for i, example in enumerate(examples):
        ids = torch.tensor([example.prompt + example.response])
        log_q, log_p = (
            m.model(ids).logits[0, len(example.prompt) - 1 : -1].double().log_softmax(-1) for m in (student, teacher)
        )
        assert reverse.totals[i].item() == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-4)
        assert forward.totals[i].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4)
        assert reverse.counts[i] == forward.counts[i] == len(example.response)


def test_own_samples_do_not_depend_on_the_batch(world):
    _, student, teacher, _, examples = world
    one, all_at_once = (
        own_samples(student, teacher, examples, EvalConfig(samples=2, sample_tokens=5, batch_size=size), 0)
        for size in (2, 64)
    )
    torch.testing.assert_close(one.totals, all_at_once.totals, rtol=1e-4, atol=1e-4)
    assert one.counts.tolist() == all_at_once.counts.tolist()


def test_a_student_that_is_the_teacher_has_no_divergence(world):
    _, _, teacher, _, examples = world
    assert own_samples(teacher, teacher, examples, EvalConfig(sample_tokens=4), 0).mean == pytest.approx(0, abs=1e-5)


def test_held_out_prompts_are_not_those_trained_on(world, files):
    config, _, _, tokenizer, _ = world
    train = [str(files / "train.jsonl")]
    examples = evaluation_set(config, tokenizer, train)
    assert len(examples) == 6
    trained_on = {record.prompt for record in read_records(train[0])}
    assert not trained_on & {example.record.prompt for example in examples}
    assert [e.prompt for e in examples] == [e.prompt for e in evaluation_set(config, tokenizer, train)]
    both = files / "both.jsonl"
    both.write_text((files / "train.jsonl").read_text() + (files / "eval.jsonl").read_text())
    flags = [f"--data.eval={both}", "--eval.prompts=7"]
    with pytest.raises(DataError, match=r"has 6 held-out prompts.*eval.prompts asks for 7"):
        evaluation_set(load_recipe(files / "recipe.yaml", flags).run, tokenizer, train)


def test_zero_prompts_are_all(world, files):
    _, _, _, tokenizer, _ = world
    config = load_recipe(files / "recipe.yaml", ["--eval.prompts=0"]).run
    assert len(evaluation_set(config, tokenizer)) == 6


def test_evaluating_changes_nothing(world):
    config, student, teacher, tokenizer, examples = world
    first, second = (evaluate(student, teacher, tokenizer, examples, config) for _ in range(2))
    for name, value in first.estimates.items():
        assert difference(second.estimates[name], value)["mean"] == 0
    assert first.answers == second.answers
