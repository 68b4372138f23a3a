"""A teacher on a server is measured, and measured against, as the teacher here; a stored one as far as it can be."""

import json

import pytest
import torch

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, DataConfig
from minillm.data.examples import encode, read_records
from minillm.evaluation.measure import measure
from minillm.model.head import CausalLM
from minillm.teacher.stored import StoredTeacher

FLAGS = ["--eval.samples=3", "--eval.sample_tokens=6", "--eval.greedy_tokens=5", "--eval.batch_size=8"]
NUMBERS = ("loss", "rouge_l", "exact_match", "reverse_kl", "forward_kl", "exposure_bias", "calibration", "distinct",
           "length")  # fmt: skip


@pytest.fixture
def world(files, make_llama, tokenizer):
    config = load_recipe(files / "recipe.yaml", FLAGS).run
    examples = encode(read_records(config.data.eval), tokenizer, config.data, DataConfig(), "eval").examples
    return tokenizer, examples, config


def assert_same(found, expected):
    """All numbers, to the rounding of forward passes that are padded in another way."""
    assert found.keys() == expected.keys()
    for name in NUMBERS:
        assert (name in found) == (name in expected)
        for ours, theirs in zip(_leaves(found.get(name)), _leaves(expected.get(name)), strict=True):
            assert ours == theirs or ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), name


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    return [leaf for each in tree for leaf in _leaves(each)] if isinstance(tree, list) else [tree]


@pytest.mark.parametrize(("columns", "request_tokens"), [(257, 65536), (250, 80)])
def test_a_student_is_measured_against_a_served_teacher_as_against_the_teacher(
    world, serve, ask, make_llama, columns, request_tokens
):
    def student():
        return CausalLM(make_llama(2, seed=1, vocab_size=columns))

    if columns < 257:  # the tokens of the data are below
        world[1][:] = [e for e in world[1] if max(e.prompt + e.response) < columns]
    expected = measure(student(), CausalLM(make_llama(4)), *world).to_dict()
    assert "exposure_bias" in expected and "own_samples" in expected["reverse_kl"]
    assert_same(measure(student(), ask(serve(request_tokens=request_tokens)), *world).to_dict(), expected)


def test_a_served_teacher_is_measured_itself(world, serve, ask, make_llama):
    expected = measure(CausalLM(make_llama(4)), None, *world).to_dict()
    assert expected["calibration"]["next_token"]["count"] > 10
    assert_same(measure(ask(serve()), None, *world).to_dict(), expected)


def test_two_models_on_servers_are_compared(world, serve, ask, make_llama):
    models = make_llama(2, seed=1), make_llama(4)
    expected = measure(*map(CausalLM, models), *world).to_dict()
    assert_same(measure(*(ask(serve(model)) for model in models), *world).to_dict(), expected)


def test_the_command_takes_addresses(files, serve, capsys):
    url, command = serve().url, ["evaluate", str(files / "student"), "--data", str(files / "eval.jsonl"), *FLAGS]
    found = {}
    for name, teacher in (("here", str(files / "teacher")), ("there", url)):
        assert main([*command, "--teacher", teacher]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["there"].pop("teacher") == url and found["here"].pop("teacher") == str(files / "teacher")
    assert_same(found["there"], found["here"])

    alone = ["evaluate", url, "--data", str(files / "eval.jsonl"), *FLAGS]
    assert main([*alone, "--tokenizer", str(files / "student")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == url and "parameters" not in told and told["calibration"]
    assert main(alone) == 2
    assert "which sends no tokenizer" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(files / "teacher")]) == 2
    assert "has a tokenizer of its own" in capsys.readouterr().err


def test_a_server_of_another_tokenizer_is_refused(files, serve, make_tokenizer, capsys):
    make_tokenizer(reverse=True).save_pretrained(files / "student")
    command = ["evaluate", str(files / "student"), "--data", str(files / "eval.jsonl"), *FLAGS]
    assert main([*command, "--teacher", serve().url]) == 2
    assert "another tokenizer than the student's" in capsys.readouterr().err


# ---- stored


def store(files, *flags):
    out, given = files / "kept", ["--data.max_response_length=64", *flags]
    assert main(["teach", str(files / "teacher"), f"--data={files / 'eval.jsonl'}", f"--out={out}", *given]) == 0
    return out


def test_a_stored_teacher_says_what_it_was_asked_and_the_rest_is_named(files, world, make_llama, capsys):
    kept, student = store(files), str(files / "student")
    capsys.readouterr()
    assert main(["evaluate", student, "--data", str(files / "eval.jsonl"), "--teacher", str(kept), *FLAGS]) == 0
    shown = capsys.readouterr()
    assert "not measured: the reverse KL on the student's own samples" in shown.err
    found = json.loads(shown.out)
    expected = measure(CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4)), *world).to_dict()
    for name in ("reverse_kl", "forward_kl"):
        assert list(found[name]) == ["references"]
        assert found[name]["references"]["mean"] == pytest.approx(expected[name]["references"]["mean"], rel=1e-4)
    assert "exposure_bias" not in found and list(found["rouge_l"]) == ["greedy", "sampled"]


def test_a_store_of_other_data_or_of_top_tokens_is_refused(files, capsys):
    kept, command = store(files, "--top-k=9"), ["evaluate", str(files / "student"), "--data"]
    assert main([*command, str(files / "eval.jsonl"), "--teacher", str(kept), *FLAGS]) == 2
    assert "holds the top 9 tokens alone" in capsys.readouterr().err
    for file in kept.iterdir():
        file.unlink()
    kept.rmdir()
    kept = store(files)
    assert main([*command, str(files / "train.jsonl"), "--teacher", str(kept), *FLAGS]) == 2
    assert f"{kept} does not hold what the teacher says of it" in capsys.readouterr().err


def test_a_stored_head_keeps_the_columns_of_a_smaller_student(files):
    kept = StoredTeacher(store(files), torch.device("cpu"))
    kept.keep_columns(250)
    assert kept.vocab_size == len(kept.head.weight) == 250
    kept.to(torch.device("cpu"))
    assert len(kept.head.weight) == 250
    with pytest.raises(ConfigError, match="no head"):
        (files / "kept").rename(files / "hidden")
        assert StoredTeacher(store(files, "--top-k=9"), torch.device("cpu")).head
