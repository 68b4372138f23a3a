"""A student that cannot be written is found before it is trained; what could not be written leaves nothing behind."""

import functools
import resource

import pytest
import torch

from minillm.cli import main
from minillm.config.schema import ConfigError
from minillm.model.load import load_model, load_tokenizer
from minillm.run import export
from minillm.run.export import check_export


@pytest.fixture
def student(files):
    return load_model(str(files / "student")), load_tokenizer(str(files / "student"))


def test_the_trial_takes_no_storage_and_leaves_the_model_as_it_is(student):
    model, tokenizer = student
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_export(model, tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_generation_configuration_that_cannot_be_saved(student, tmp_path):
    model, tokenizer = student
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.7
    with pytest.raises(ValueError, match="temperature"):  # as it would at the end
        model.save_pretrained(tmp_path / "end")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM could be trained, but not written .*temperature"):
        check_export(model, tokenizer)


def test_a_configuration_that_cannot_be_saved(student):
    model, tokenizer = student
    model.config.secret = object()
    with pytest.raises(ConfigError, match="could be trained, but not written at the end and read again"):
        check_export(model, tokenizer)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 1), ("intermediate_size", 7)])
def test_a_configuration_that_describes_another_model(student, key, value):
    model, tokenizer = student
    setattr(model.config, key, value)
    with pytest.raises(ConfigError, match=r"could be trained, but not written at the end and read again .*layers"):
        check_export(model, tokenizer)


def test_a_failure_of_the_end_is_found_before_the_first_step(files, monkeypatch, capsys):
    def fail(model):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(export, "merge_adapters", fail)
    assert main(["train", str(files / "recipe.yaml")]) == 2
    printed = capsys.readouterr()
    assert "RecursionError: maximum recursion depth exceeded" in printed.err and "warm-up  1/3" not in printed.out
    assert not (files / "run").exists()


# ---- a full disk


@pytest.fixture
def limited():
    """Gives a function that limits the size of files: write(2) really fails, in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_at_the_end_of_training(files, limited, capsys):
    limited(50_000)
    assert main(["train", str(files / "recipe.yaml"), "--log.checkpoint_every=0"]) == 2
    error = capsys.readouterr().err
    assert f"minillm: {files / 'run' / 'model'} could not be written: " in error
    assert "Make room there, or write to another directory. There is no checkpoint yet" in error
    assert not [path.name for path in (files / "run").iterdir() if "model" in path.name]


@pytest.mark.parametrize("ended", [True, False])
def test_a_disk_that_is_full_at_an_export(files, limited, capsys, ended):
    assert main(["train", str(files / "recipe.yaml")]) == 0
    if not ended:
        (files / "run" / "summary.json").unlink()
    limited(50_000)
    target = files / "exports" / "one"
    assert main(["export", str(files / "run"), "--output", str(target)]) == 2
    assert f"minillm: {target} could not be written: " in capsys.readouterr().err
    assert not list((files / "exports").iterdir())
    limited(resource.RLIM_INFINITY)
    assert main(["export", str(files / "run"), "--output", str(target)]) == 0
    load_model(str(target))


def test_results_that_cannot_be_written(files, limited, capsys):
    """Below a file, into a directory, on a full disk; an evaluation says so before it has worked."""
    pytest.importorskip("matplotlib")  # of the report
    file = files / "text.txt"
    assert main(["train", str(files / "recipe.yaml")]) == 0
    measure = ["evaluate", str(files / "student"), "--data", str(files / "eval.jsonl"), "--eval.prompts=2", "--out"]
    for command in (
        [*measure, str(file / "e.json")],
        ["report", str(files / "run"), "--out", str(file)],
        ["export", str(files / "run"), "--output", str(file / "model")],
        ["train", str(files / "recipe.yaml"), f"--output={file / 'run'}"],
        ["train", str(files / "recipe.yaml"), f"--output={file}"],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        assert capsys.readouterr().err.startswith("minillm: "), command
    limited(300)
    for command in ([*measure, str(files / "e.json")], ["report", str(files / "run"), "--out", str(files / "page")]):
        assert main(command) == 2, command
        assert "Make room" in capsys.readouterr().err
    left = [path for path in files.rglob(".*") if functools.reduce(lambda a, b: b, path.name.split(".")).isdigit()]
    assert not left and not (files / "e.json").exists()
