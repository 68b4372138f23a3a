"""A checkpoint is compared with its manifest and with the student before it is used, or the one before is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.distillation import run_recipe
from minillm.model.load import load_student
from minillm.run import checkpoint
from minillm.run.checkpoint import CheckpointError, Progress
from minillm.run.verify import MANIFEST, write_manifest

FLAGS = ["--log.checkpoint_every=1", "--log.checkpoints_kept=9"]


@pytest.fixture
def run(files):
    """One that has ended, with a checkpoint of each of its eight steps."""
    run_recipe(load_recipe(files / "recipe.yaml", FLAGS), with_evaluation=False)
    return files / "run"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of the weights": lambda at: flip(at / "model.safetensors", -1),
    "a bit of the moments": lambda at: flip(at / "optimizer.safetensors", -1),
    "a bit of a header": lambda at: flip(at / "random.safetensors", 20),
    "a bit of the rollouts": lambda at: flip(at / "memory.safetensors", -1),
    "a bit of the progress": lambda at: flip(at / "progress.json", 40),
    "cut": lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:-8]),
    "empty": lambda at: (at / "optimizer.safetensors").write_bytes(b""),
    "gone": lambda at: (at / "random.safetensors").unlink(),
    "a directory": lambda at: ((at / "progress.json").unlink(), (at / "progress.json").mkdir()),
    "deep JSON": lambda at: (at / "progress.json").write_text("[" * 100_000),
    "no manifest": lambda at: (at / MANIFEST).unlink(),
    "no JSON": lambda at: (at / MANIFEST).write_text("{"),
    "a list": lambda at: (at / MANIFEST).write_text("[]"),
    "a path outside": lambda at: (at / MANIFEST).write_text('{"files": {"../step-7/model.safetensors": {}}}'),
    "nothing in it": lambda at: (at / MANIFEST).write_text('{"files": {}}'),
}


def test_damage_of_every_kind_falls_back_to_the_one_before(files, run, capsys):
    recipe = load_recipe(files / "recipe.yaml", FLAGS)
    student = load_student(recipe.run, None)
    for name, damage in DAMAGES.items():
        copy = files / "copy"
        shutil.copytree(run, copy)
        damage(copy / "checkpoints" / "step-8")
        found = checkpoint.newest_usable(copy, recipe, student)
        assert found.path == copy / "checkpoints" / "step-7", name
        printed = capsys.readouterr().out
        assert "step-8 is damaged (" in printed or "step-8 cannot be used (" in printed, name
        assert f"kept as {copy}/checkpoints/step-8.damaged; going on from {found.path}" in printed
        assert (copy / "checkpoints" / "step-8.damaged").exists() and not (copy / "checkpoints" / "step-8").exists()
        shutil.rmtree(copy)


def test_resumed_behind_a_damaged_checkpoint_the_run_ends_with_the_same_bits(files, run, capsys):
    weights, metrics = load_file(run / "model" / "model.safetensors"), (run / "metrics.jsonl").read_text()
    for step in (7, 8):
        flip(run / "checkpoints" / f"step-{step}" / "optimizer.safetensors", -1)
    assert main(["train", str(files / "recipe.yaml"), *FLAGS, "--resume", str(run / "checkpoints" / "step-8")]) == 2
    assert "step-8 is damaged (ValueError: optimizer.safetensors has" in capsys.readouterr().err
    assert main(["train", str(files / "recipe.yaml"), *FLAGS, "--resume", "auto"]) == 0
    assert "resuming after step 6" in capsys.readouterr().out
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    losses = [[json.loads(line)["loss"] for line in text.splitlines()]
              for text in (metrics, (run / "metrics.jsonl").read_text())]  # fmt: skip
    assert losses[0] == losses[1]


def test_where_all_are_damaged_the_run_says_so_and_touches_nothing(files, run, capsys):
    for path in (run / "checkpoints").iterdir():
        flip(path / "model.safetensors", -1)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert main(["train", str(files / "recipe.yaml"), *FLAGS, "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint of" in error and f"To start anew, delete {run / 'checkpoints'}" in error
    assert {path.name for path in (run / "checkpoints").iterdir()} == names


# ---- what a manifest cannot tell: files that are as they were written, of something else


def of_tensors(file, change):
    def apply(at):
        tensors = load_file(at / file)
        change(tensors)
        save_file(tensors, at / file, metadata={"format": "pt"})

    return apply


def of_progress(**values):
    def apply(at):
        state = json.loads((at / "progress.json").read_text())
        state["progress"] |= values
        (at / "progress.json").write_text(json.dumps(state))

    return apply


def all_of(key, value):
    return lambda tensors: tensors.update({k: value(v) for k, v in tensors.items() if k.endswith(key)})


def moments(change):
    return of_tensors("optimizer.safetensors", change)


def weights(change):
    return of_tensors("model.safetensors", change)


def random(change):
    return of_tensors("random.safetensors", change)


FOREIGN = {
    "moments of shape [1]": (moments(all_of("exp_avg", lambda x: torch.ones(1))), r"\[1\]"),
    "half of the moments": (moments(lambda t: t.pop("lm_head.weight.exp_avg_sq")), "absent"),
    "moments in float64": (moments(all_of("exp_avg_sq", lambda x: x.double())), "float64"),
    "moments of nothing": (moments(lambda t: t.update(x=torch.ones(1))), "x is float32"),
    "step 1e30": (moments(all_of(".step", lambda x: x + 1e30)), "1e\\+30 after 5 steps"),
    "moments of NaN": (moments(all_of("exp_avg", lambda x: x / 0)), "not finite"),
    "a weight of shape [1]": (weights(all_of("norm.weight", lambda x: x[:1].clone())), r"\[1\]"),
    "weights of integers": (weights(all_of("norm.weight", lambda x: x.long())), "int64"),
    "a weight too few": (weights(lambda t: t.pop("lm_head.weight")), "absent there"),
    "an infinite weight": (weights(all_of("lm_head.weight", lambda x: x + torch.inf)), "finite"),
    "another random state": (random(all_of("cpu", lambda x: x[:, :9].clone())), "random state"),
    "no random state": (lambda at: (at / "random.safetensors").unlink(), "random state"),
    "a stage of no recipe": (of_progress(stage="other"), "where this recipe never is"),
    "a step of no stage": (of_progress(step=10**9), "where this recipe never is"),
    "a step of text": (of_progress(step="5"), "where this recipe never is"),
    "an unknown field": (of_progress(more=1), "is damaged"),
}  # fmt: skip


def test_weights_and_moments_of_another_shape_type_or_run_are_refused(files, run):
    recipe = load_recipe(files / "recipe.yaml", FLAGS)
    student = load_student(recipe.run, None)
    source = run / "checkpoints" / "step-8"
    assert checkpoint.load(source, recipe, student).progress.step == 5
    for name, (change, message) in FOREIGN.items():
        copy = files / "step-8"
        shutil.copytree(source, copy)
        change(copy)
        (copy / MANIFEST).unlink()
        (copy / "DONE").unlink()
        write_manifest(copy)
        (copy / "DONE").touch()
        with pytest.raises(CheckpointError, match=message):
            print(name, checkpoint.load(copy, recipe, student).progress)
        shutil.rmtree(copy)


def test_other_names_beside_checkpoints_are_let_be(files, capsys):
    folder = files / "run" / "checkpoints"
    assert main(["train", str(files / "recipe.yaml"), *FLAGS, "--log.checkpoints_kept=2"]) == 0
    others = ["step-5.bak", "step-3-keep", "step-", "step-007", "step-8.damaged", "step--1", "step-x"]
    for name in others:
        shutil.copytree(folder / "step-7", folder / name)
    shutil.rmtree(folder / "step-8")
    assert main(["train", str(files / "recipe.yaml"), *FLAGS, "--log.checkpoints_kept=2", "--resume", "auto"]) == 0
    assert "resuming after step 7" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"step-7", "step-8", *others}


def test_an_earlier_checkpoint_asked_for_does_not_lose_to_later_ones(files, run, capsys):
    """Their metrics are dropped, so they must not be what --resume auto finds, nor push the new ones out."""
    flags = [*FLAGS[:1], "--log.checkpoints_kept=2"]
    recipe, folder = str(files / "recipe.yaml"), run / "checkpoints"
    assert main(["train", recipe, *flags, "--resume", str(folder / "step-2")]) == 0
    assert f"step-8 is of a later step: it is kept as {folder / 'step-8.later'}" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir() if checkpoint.STEP.fullmatch(path.name)} == {"step-7", "step-8"}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [*range(1, 9)]


def test_the_best_weights_are_checked_before_the_first_step(files, capsys):
    flags = [*FLAGS, "--validation.every=2"]
    assert main(["train", str(files / "recipe.yaml"), *flags]) == 0
    for newer in ("step-8", "step-7"):
        shutil.rmtree(files / "run" / "checkpoints" / newer)
    best = json.loads((files / "run/checkpoints/step-6/progress.json").read_text())["progress"]["best"]
    assert best["step"] != 3  # else the weights of the checkpoint themselves
    path = files / "run" / "stages" / "minillm" / f"best-{best['step']}.safetensors"
    for damage in (lambda: flip(path, -1), lambda: path.write_bytes(path.read_bytes()[:-4]), path.unlink):
        damage()
        capsys.readouterr()
        assert main(["train", str(files / "recipe.yaml"), *flags, "--resume", "auto"]) == 2
        printed = capsys.readouterr()
        assert str(path) in printed.err and "minillm  4/5" not in printed.out


# ---- what is never written


def test_weights_that_are_not_finite_are_never_saved(files, capsys):
    """The update overflows at the last step of what the loss and its gradient tell."""
    flags = ["--log.checkpoint_every=1", "--stages.warm-up.optim.lr=1e38"]
    assert main(["train", str(files / "recipe.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert "warm-up, step 1: " in error and "is not finite after the update, and no checkpoint is written" in error
    assert checkpoint.latest(files / "run") is None
    assert not list((files / "run").rglob("*.safetensors"))


def test_a_model_that_is_not_finite_is_not_written(files, capsys):
    flags = ["--log.checkpoint_every=0", "--stages.warm-up.optim.lr=1e38", "--stages.warm-up.optim.steps=1"]
    assert main(["train", str(files / "recipe.yaml"), *flags]) == 2
    assert "is not finite, so" in capsys.readouterr().err
    assert not (files / "run" / "model").exists()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group", ["model", "adapter", "optimizer"])
def test_the_checkpoint_before_stays_where_a_tensor_is_not_finite(files, group, bad):
    recipe, folder = load_recipe(files / "recipe.yaml"), files / "run" / "checkpoints"
    from transformers import LlamaConfig

    model = type("M", (), {"config": LlamaConfig()})
    tensors = {"a": torch.ones(3), "b": torch.zeros(4, dtype=torch.bfloat16), "none": torch.zeros(0)}
    checkpoint.save(folder, recipe, Progress("minillm", 1), {group: tensors}, model, keep=1)
    tensors["b"][2] = bad
    with pytest.raises(FloatingPointError, match=r"minillm, step 2: b is not finite .*step-1, is whole"):
        checkpoint.save(folder, recipe, Progress("minillm", 2), {group: tensors}, model, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-1"]
