import dataclasses
import json

import pytest
import torch

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, DataConfig
from minillm.data.examples import DataError, encode, read_records
from minillm.evaluation.divergence import draw
from minillm.evaluation.means import difference
from minillm.evaluation.measure import PARTS, evaluation_set, measure
from minillm.evaluation.result import Evaluation
from minillm.evaluation.text import rouge_l
from minillm.model.head import CausalLM
from minillm.report.summary import evaluation_text

FLAGS = ["--eval.samples=3", "--eval.sample_tokens=6", "--eval.greedy_tokens=5", "--eval.batch_size=8"]


@pytest.fixture
def world(files, make_llama, tokenizer):
    config = load_recipe(files / "recipe.yaml", FLAGS).run
    examples = encode(read_records(config.data.eval), tokenizer, config.data, DataConfig(), "eval").examples
    return config, CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4)), tokenizer, examples


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


def test_everything_is_measured_and_is_json(world):
    config, student, teacher, tokenizer, examples = world
    found = measure(student, teacher, tokenizer, examples, config)
    result = json.loads(json.dumps(found.to_dict()))
    assert result["generation"]["sampled"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "seeds": [1234, 1235, 1236],
    }  # fmt: skip
    assert result["generation"]["no_repeat_ngram_size"] == 0
    drawn = draw(student, None, examples, config.eval, [0]).token_ids
    references = [e.record.references for e in examples]
    by_seed = [
        rouge_l([t.strip() for t in tokenizer.batch_decode(drawn[s::3], skip_special_tokens=True)], references).mean
        for s in range(3)
    ]
    assert result["rouge_l"]["sampled"]["by_seed"] == pytest.approx(by_seed)
    assert result["rouge_l"]["sampled"]["mean"] == pytest.approx(sum(by_seed) / 3)
    assert result["exposure_bias"]["weighting"] == "prompts"
    first = result["exposure_bias"]["exaccerr"][0]  # %, in float32: before the first token, one prefix
    assert first == pytest.approx(0, abs=1e-4)
    assert sum(part["prompts"] for part in result["by_reference_length"].values()) == len(examples)
    assert result["tokens_per_second"] > 0 and "options" not in result["calibration"]
    assert len(result["responses"]) == config.log.samples
    text = evaluation_text(found)
    assert "ROUGE-L" in text and "ExAccErr at 4 tokens" in text


def test_an_evaluation_comes_back_from_its_json(world):
    config, student, teacher, tokenizer, examples = world
    one_prompt = measure(student, teacher, tokenizer, examples[:1], config)  # its standard errors are undefined
    for found in (measure(student, teacher, tokenizer, examples, config), one_prompt):
        written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        again = Evaluation.from_dict(written)
        assert again.to_dict() == written and evaluation_text(again) == evaluation_text(found)
        for name, mean in found.means.items():
            assert torch.equal(again.means[name].totals, mean.totals)
            assert torch.equal(again.means[name].counts, mean.counts)
        short = found.to_dict(per_prompt=False)
        assert short == {key: value for key, value in written.items() if key != "per_prompt"}
        assert Evaluation.from_dict(short).to_dict(per_prompt=False) == short


def test_evaluating_changes_nothing(world):
    config, student, teacher, tokenizer, examples = world
    first, second = (measure(student, teacher, tokenizer, examples, config) for _ in range(2))
    for name, value in first.means.items():
        assert difference(second.means[name], value)["mean"] == 0
    assert first.responses == second.responses


def test_each_part_alone_is_what_it_is_among_all(world):
    config, student, teacher, tokenizer, examples = world
    whole = measure(student, teacher, tokenizer, examples, config).to_dict()
    for part in PARTS:
        found = measure(student, teacher, tokenizer, examples, config, [part]).to_dict()
        assert found["per_prompt"]
        for metric in found.keys() & {"rouge_l", "exact_match", "reverse_kl", "forward_kl", "length"}:
            assert found[metric] == {along: whole[metric][along] for along in found[metric]}
        for metric in found.keys() & {"distinct", "calibration", "loss"}:
            assert found[metric] == whole[metric]
    assert set(found) == {"prompts", "generation", "calibration", "loss", "seconds", "per_prompt"}


def test_a_student_that_is_the_teacher_errs_nowhere(world):
    config, _, teacher, tokenizer, examples = world
    result = measure(teacher, teacher, tokenizer, examples, config)
    assert result.means["reverse_kl/own_samples"].mean == pytest.approx(0, abs=1e-5)
    assert result.means["forward_kl/teacher_samples"].mean == pytest.approx(0, abs=1e-5)


def test_without_a_teacher(world):
    config, student, _, tokenizer, examples = world
    result = measure(student, None, tokenizer, examples, config)
    assert result.exposure_bias is None and not [name for name in result.means if "kl" in name]
    assert result.means["loss"].mean > 0 and "ROUGE-L" in evaluation_text(result)


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
    found = measure(student, teacher, tokenizer, examples[:1], config)
    result = found.to_dict()
    json.dumps(result, allow_nan=False)
    assert result["distinct"]["4"]["mean"] is None  # no text has four words
    assert result["rouge_l"]["greedy"]["standard_error"] is None  # of one prompt
    assert "± ?" in evaluation_text(found)


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
