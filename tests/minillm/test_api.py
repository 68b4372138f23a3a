"""The Python API: its examples run, and it does what the command line does."""

import doctest
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import minillm
import minillm_kernels
from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError

ROOT = Path(__file__).parents[2]
KD = {"method": "kd", "optim": {"steps": 2, "batch_size": 4, "lr": 1e-3}}


@pytest.fixture(autouse=True)
def here(files, monkeypatch):
    """The directory of the examples: teacher/, student/, train.jsonl, eval.jsonl and recipe.yaml."""
    monkeypatch.chdir(files)


@pytest.mark.parametrize("name", minillm.__all__)
def test_examples_run(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(minillm, name), name)
    assert example.examples
    runner, told = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)


def test_importing_it_is_quick_and_it_stays_a_function():
    code = (
        "import sys, minillm\nassert not {'torch', 'transformers', 'yaml'} & sys.modules.keys()\n"
        "import minillm.distillation, minillm.evaluation.measure\nassert callable(minillm.distill)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_version_is_one():
    pyproject = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.*)"', pyproject, re.MULTILINE).group(1)
    assert minillm.__version__ == minillm_kernels.__version__ == found


def test_shorthands_sections_and_stages_are_the_recipe_in_yaml(files, capsys):
    handler, bars = signal.getsignal(signal.SIGTERM), logging.is_progress_bar_enabled()
    run = minillm.distill(
        teacher=files / "teacher",
        student="student",
        train=files / "train.jsonl",
        stages={"first": KD},
        data={"eval": files / "eval.jsonl", "max_response_length": 16},
        eval={"prompts": 4, "sample_tokens": 4, "greedy_tokens": 4},
        seed=3,
        output=files / "api",
    )
    assert signal.getsignal(signal.SIGTERM) == handler and logging.is_progress_bar_enabled() == bars
    printed = capsys.readouterr().out
    flags = ["--seed=3", "--eval.prompts=4", "--eval.sample_tokens=4", "--eval.greedy_tokens=4", "--output=cli"]
    tree = {"method": "kd", "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_response_length": 16},
            "model": {"teacher": "teacher", "student": "student"}, "stages": {"first": KD}}  # fmt: skip
    (files / "same.yaml").write_text(json.dumps(tree))
    assert main(["distill", "same.yaml", *flags]) == 0
    by_command = json.loads((files / "cli" / "summary.json").read_text())
    for stage in ("start", "first", "teacher"):
        for metric in run.summary["evaluations"][stage].keys() & {"reverse_kl", "rouge_l"}:
            assert run.summary["evaluations"][stage][metric] == by_command["evaluations"][stage][metric]
    told = capsys.readouterr().out
    for lines in ("first  2/2", "evaluating (first)", "reverse KL, own samples", "model, metrics and summary.json"):
        assert lines in printed and lines in told
    AutoModelForCausalLM.from_pretrained(run.model_path)
    assert json.loads((run.path / "summary.json").read_text()) == run.summary


def test_a_recipe_is_a_path_or_what_load_recipe_gave(capsys):
    recipe = minillm.load_recipe("recipe.yaml", smoke=True, data={"eval": ""}, output="a")
    assert recipe == load_recipe("recipe.yaml", ["--data.eval=", "--output=a"], smoke=True)
    run = minillm.distill(recipe)
    assert run.evaluations == {} and run.summary["stages"]["minillm"]["steps"] == 1
    assert "evaluating" not in capsys.readouterr().out  # without held-out prompts it trains only
    again = minillm.distill(Path("recipe.yaml"), data={"eval": ""}, stages={"minillm": {"optim": {"steps": 2}}},
                            output="b", **{"log.checkpoint_every": 0})  # fmt: skip
    assert {name: stage["steps"] for name, stage in again.summary["stages"].items()} == {"warm-up": 3, "minillm": 2}


def test_a_list_names_the_methods_of_the_stages():
    shared = {"optim": {"steps": 1, "batch_size": 2}, "output": "listed"}
    run = minillm.distill(teacher="teacher", student="student", train="train.jsonl", stages=["sft", "kd"], **shared)
    assert {name: stage["method"] for name, stage in run.summary["stages"].items()} == {"sft": "sft", "kd": "kd"}


def test_the_command_of_a_run_repeats_it(capsys):
    run = minillm.distill("recipe.yaml", data={"eval": ""}, output="r", **{"optim.steps": 1})
    command = run.summary["command"]
    assert command == "minillm train r/config.yaml" and f"`{command}`" in (run.model_path / "README.md").read_text()
    assert main([*command.split()[1:], "--output=again"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": object()}, "teacher is a object; expected the path.*hub id or package:NAME.*save_pretrained"),
        ({"train": [{"instruction": "x"}]}, "train is a list; expected the path of a file"),
        ({"optm": {"lr": 1}}, "did you mean 'optim'"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'; expected float"),
        ({"stages": ["kd", "kd"]}, r"\['kd', 'kd'\] names a method twice"),
        ({"stages": {"teacher": {"method": "kd"}}, "data": {"eval": "eval.jsonl"}}, "a stage is called 'teacher'"),
        ({"stages": {"a": {"model": {"dtype": "float16"}}}}, "stages.a.model.dtype cannot differ between stages"),
        ({"train": "none.jsonl"}, None),
    ],
)
def test_errors_are_those_of_a_recipe(arguments, message):
    defaults = {"teacher": "teacher", "student": "student", "train": "train.jsonl", "method": "kd", "output": "o"}
    with pytest.raises(ConfigError if message else Exception, match=message or "no data at 'none.jsonl'"):
        minillm.distill(**defaults | arguments)
    assert not Path("o").exists()


def test_an_evaluation_refuses_what_it_would_not_read():
    with pytest.raises(
        ConfigError, match="does not read 'optim'; it reads the sections eval, engine, model, teacher, data, log"
    ):
        minillm.evaluate("student", "eval.jsonl", optim={"lr": 1})
    with pytest.raises(ConfigError, match="teacher is a dict; expected the path"):
        minillm.evaluate("student", "eval.jsonl", teacher={"dtype": "float32"})


def test_a_model_that_decodes_by_another_law_is_not_measured(files, make_tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(files / "mamba")
    make_tokenizer().save_pretrained(files / "mamba")
    with pytest.raises(ConfigError, match="decodes by another law than its forward pass"):
        minillm.evaluate(files / "mamba", files / "eval.jsonl")
    assert main(["generate", str(files / "mamba"), "--prompt", "a"]) == 2
