import dataclasses
import json
import math

import pytest
import torch

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, DataConfig, EvalConfig
from minillm.data.examples import encode, read_records
from minillm.evaluate.measure import measure, measure_answers, over_seeds
from minillm.evaluate.rouge import rouge_l
from minillm.evaluate.samples import draw
from minillm.model.head import CausalLM
from minillm.report.summary import evaluation_text

FLAGS = ["--eval.samples=3", "--eval.sample_tokens=6", "--eval.greedy_tokens=5", "--eval.batch_size=8"]


@pytest.fixture
def world(files, make_llama, tokenizer):
    config = load_recipe(files / "recipe.yaml", FLAGS).run
    examples = encode(read_records(config.data.eval), tokenizer, config.data, DataConfig(), "eval").examples
    return config, CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4)), tokenizer, examples


@torch.no_grad()
def test_divergences_of_samples_against_plain_torch(world):
    _, student, teacher, _, examples = world
    drawn = draw(teacher, student, examples[:2], EvalConfig(samples=2, sample_tokens=5, batch_size=2), 0)
    for row, tokens in enumerate(drawn.token_ids):
        prompt = examples[row // 2].prompt
        log_p, log_q = (
            m.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for m in (teacher, student)
        )
        forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
        torch.testing.assert_close(drawn.to_other[row, : len(tokens)], forward, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drawn.from_other[row, : len(tokens)], reverse, rtol=1e-4, atol=1e-5)
        assert drawn.to_other[row, len(tokens) :].sum() == 0


def test_a_seed_draws_the_same_however_many_there_are(world):
    _, student, _, _, examples = world
    few, many = (draw(student, None, examples, EvalConfig(samples=s, sample_tokens=5), 0).token_ids for s in (1, 3))
    assert few == many[::3] and many[::3] != many[1::3]


def test_everything_is_measured_and_is_json(world):
    config, student, teacher, tokenizer, examples = world
    result = json.loads(json.dumps(measure(student, teacher, tokenizer, examples, config)))
    assert result["generation"]["sampled"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "seeds": [1234, 1235, 1236],
    }  # fmt: skip
    assert result["generation"]["no_repeat_ngram_size"] == 0
    drawn = draw(student, None, examples, config.eval, 0).token_ids
    references = [e.record.references for e in examples]
    by_seed = [
        rouge_l([t.strip() for t in tokenizer.batch_decode(drawn[s::3], skip_special_tokens=True)], references).mean
        for s in range(3)
    ]
    assert result["rouge_l"]["sampled"]["by_seed"] == pytest.approx(by_seed)
    assert result["rouge_l"]["sampled"]["mean"] == pytest.approx(sum(by_seed) / 3)
    assert result["exposure_bias"]["exaccerr"][0] == pytest.approx(
        0, abs=1e-4
    )  # %, in float32: before the first token, one prefix
    assert sum(part["prompts"] for part in result["by_reference_length"].values()) == len(examples)
    assert result["tokens_per_second"] > 0 and result["calibration"]["options"] is None
    text = evaluation_text(result)
    assert "ROUGE-L" in text and "ExAccErr at 4 tokens" in text


def test_a_student_that_is_the_teacher_errs_nowhere(world):
    config, _, teacher, tokenizer, examples = world
    result = measure(teacher, teacher, tokenizer, examples, config)
    assert result["reverse_kl"]["own_samples"]["mean"] == pytest.approx(0, abs=1e-5)
    assert result["forward_kl"]["teacher_samples"]["mean"] == pytest.approx(0, abs=1e-5)


def test_without_a_teacher(world):
    config, student, _, tokenizer, examples = world
    result = measure(student, None, tokenizer, examples, config)
    assert "exposure_bias" not in result and "reverse_kl" not in result
    assert result["loss"]["mean"] > 0 and "ROUGE-L" in evaluation_text(result)


def test_answers_alone(world):
    config, student, _, tokenizer, examples = world
    whole, found = (
        measure(student, None, tokenizer, examples, config),
        measure_answers(student, tokenizer, examples, config),
    )
    assert set(found["rouge_l"]) == {"sampled"} and "loss" not in found
    for key in ("rouge_l", "exact_match", "length"):
        assert found[key]["sampled"] == whole[key]["sampled"]


def test_settings_that_cannot_be_measured(world, files):
    _, student, teacher, tokenizer, examples = world
    warm = load_recipe(files / "recipe.yaml", ["--eval.temperature=0.7"]).run
    with pytest.raises(ConfigError, match=r"eval.temperature is 0.7.*defined at 1"):
        measure(student, teacher, tokenizer, examples, warm)
    long = load_recipe(files / "recipe.yaml", ["--eval.sample_tokens=600"]).run
    with pytest.raises(ConfigError, match="512 positions"):
        measure(student, teacher, tokenizer, examples, long)


def test_what_is_undefined_is_null_in_json(world):
    config, student, teacher, tokenizer, examples = world
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, sample_tokens=1, samples=1))
    result = measure(student, teacher, tokenizer, examples[:1], config)
    json.dumps(result, allow_nan=False)
    assert result["distinct"]["4"]["mean"] is None  # no text has four words
    assert result["rouge_l"]["greedy"]["standard_error"] is None  # of one prompt
    assert "± ?" in evaluation_text(result)


def test_over_seeds():
    assert over_seeds([1.0, 3.0]) == {"mean": 2, "standard_deviation": pytest.approx(math.sqrt(2)), "by_seed": [1, 3]}
    assert over_seeds([4.0])["standard_deviation"] == 0
    assert math.isnan(over_seeds([4.0, math.nan])["standard_deviation"])


def test_the_command_writes_json_and_prints_its_settings(files, capsys):
    out = files / "evaluation.json"
    command = ["evaluate", str(files / "student"), "--data", str(files / "eval.jsonl"), *FLAGS]
    assert main([*command, "--teacher", str(files / "teacher"), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert '"no_repeat_ngram_size": 0' in shown.err and "6 of 6 records" in shown.err and "ROUGE-L" in shown.out
    result = json.loads(out.read_text())
    assert result["prompts"] == 6 and result["teacher"] == str(files / "teacher") and "torch" in result["environment"]
    assert main([*command, "--data.prompt_template=none"]) == 2
    assert "{prompt}" in capsys.readouterr().err
    assert main([*command, "--eval.samples=0"]) == 2
    assert "eval.samples is 0" in capsys.readouterr().err
