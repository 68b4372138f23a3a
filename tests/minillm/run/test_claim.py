"""One run writes to a directory at a time, and a run that was killed leaves nothing that is in the next one's way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple

import pytest

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.distillation import run_recipe
from minillm.files import size_of
from minillm.model.load import load_student
from minillm.run import claim
from minillm.run.directory import RunDirectory
from minillm.train.preflight import space_needed


@pytest.fixture
def numbered(files, monkeypatch):
    """The recipe without an output directory, in a directory of its own."""
    monkeypatch.chdir(files)
    return load_recipe(files / "recipe.yaml", ["--output="])


def test_runs_that_start_together_take_the_next_number_each(numbered, monkeypatch):
    first = RunDirectory(numbered)
    monkeypatch.setattr(claim, "_numbered", lambda recipe: [])  # looked before the first one was made
    with first, RunDirectory(numbered) as second, RunDirectory(numbered) as third:
        assert [run.path.as_posix() for run in (first, second, third)] == [
            "runs/recipe", "runs/recipe-2", "runs/recipe-3",
        ]  # fmt: skip


def test_a_number_that_was_deleted_is_not_taken_again(numbered):
    for _ in range(3):
        with RunDirectory(numbered):
            pass
    shutil.rmtree("runs/recipe-2")
    with RunDirectory(numbered) as run:
        assert run.path.as_posix() == "runs/recipe-4"
    with RunDirectory(numbered, resume="auto") as run:
        assert run.path.as_posix() == "runs/recipe-4"  # the newest


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"]])
def test_a_directory_in_use_is_refused_with_its_holder(files, capsys, flags):
    holder = (
        "import time\nfrom minillm.config.recipe import load_recipe\nfrom minillm.run.directory import RunDirectory\n"
        f"run = RunDirectory(load_recipe({str(files / 'recipe.yaml')!r}))\nprint('held')\n"
        "import sys; sys.stdout.flush(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"

        def written():  # an older filelock opens the lock itself anew, to try it
            return {path: path.stat().st_mtime_ns for path in (files / "run").iterdir() if path.name != claim.LOCK}

        before = written()
        assert main(["train", str(files / "recipe.yaml"), *flags]) == 2
        refused = capsys.readouterr().err
        assert written() == before
        if flags:
            where = f"process {process.pid} on {socket.gethostname()}"
            assert f"{files / 'run'} is in use by {where}: wait for that run or stop it" in refused
        else:
            assert "is not empty" in refused
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(["train", str(files / "recipe.yaml"), "--resume", "auto"]) == 0  # the lock went with the process
    assert not (files / "run" / claim.HOLDER).exists()


def test_a_directory_whose_run_has_not_written_yet_is_in_use(files):
    (files / "run").mkdir()
    held = claim.hold(files / "run")
    for resume in ("", "auto"):
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"):
            RunDirectory(load_recipe(files / "recipe.yaml"), resume)
    held.release()


def test_what_killed_processes_left_is_removed_at_the_next_start(files):
    assert main(["train", str(files / "recipe.yaml")]) == 0
    run = files / "run"
    left = [
        ".metrics.jsonl.123", ".model.77/config.json", "checkpoints/.step-9.4/model.safetensors",
        "evaluations/.start.json.5", "stages/warm-up/.best-2.safetensors.9", "model/.README.md.31",
    ]  # fmt: skip
    others = [".notes", ".git/HEAD", "checkpoints/step-5.bak/DONE"]
    for name in left + others:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    assert main(["train", str(files / "recipe.yaml"), "--resume", "auto"]) == 0
    assert not [name for name in left if (run / name).exists()]
    assert not (run / ".model.77").exists() and not (run / "checkpoints" / ".step-9.4").exists()
    assert all((run / name).exists() for name in others)


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"]])
def test_a_run_that_was_killed_before_its_configuration_was_written_starts(files, flags):
    (files / "run").mkdir()
    (files / "run" / ".config.yaml.123").write_text("stages: {")
    (files / "run" / claim.HOLDER).write_text('{"pid": 123, "host": "gone"}')
    assert main(["train", str(files / "recipe.yaml"), *flags]) == 0


def test_a_directory_of_another_recipe_is_not_resumed(files, capsys):
    (files / "run").mkdir()
    (files / "run" / "config.yaml").write_text("")
    assert main(["train", str(files / "recipe.yaml"), "--resume", "auto"]) == 2
    assert "is not empty: give another --output, or delete it; its config.yaml is not of" in capsys.readouterr().err
    assert [path.name for path in (files / "run").iterdir()] == ["config.yaml"]


def test_a_disk_without_room_is_found_before_anything_is_written(files, monkeypatch, capsys):
    """Room for all but a kilobyte; then for all. What the run itself has written before counts as room."""
    usage, recipe = namedtuple("usage", "total used free"), load_recipe(files / "recipe.yaml")
    needed = space_needed(recipe, load_student(recipe.run, None))

    def status(free, *flags):
        monkeypatch.setattr(claim.shutil, "disk_usage", lambda path: usage(2 * needed, 0, free))
        return main(["train", str(files / "recipe.yaml"), *flags])

    assert status(needed - 1000) == 2
    assert "checkpoints and the student will take 1.3 MiB, but there is room for 1.3 MiB" in capsys.readouterr().err
    assert not (files / "run").exists()
    assert status(needed) == 0
    written = size_of(files / "run")
    assert status(needed - written, "--resume", "auto") == 0
    shutil.rmtree(files / "run" / "checkpoints")
    assert status(needed - written, "--resume", "auto") == 2


def test_the_space_of_a_run_is_what_it_writes_at_most(files):
    """Watched at every deletion: then there is most."""
    recipe = load_recipe(files / "recipe.yaml", ["--log.checkpoint_every=1", "--validation.every=1"])
    needed = space_needed(recipe, load_student(recipe.run, None))
    most, deleting = 0, True

    def watch(event, arguments):
        nonlocal most
        if deleting and event in ("os.remove", "os.rmdir", "shutil.rmtree"):
            most = max(most, sum(path.stat().st_size for path in (files / "run").rglob("*.safetensors")))

    sys.addaudithook(watch)
    run_recipe(recipe, with_evaluation=False)
    deleting = False
    assert 0.5 * needed < most <= 1.05 * needed  # headers of the files and rollouts are not counted


def test_samples_of_a_run_that_was_cut_short_are_neither_doubled_nor_lost(files):
    flags = ["--log.checkpoint_every=2", "--log.checkpoints_kept=9"]
    assert main(["distill", str(files / "recipe.yaml"), *flags]) == 0
    run = files / "run"
    whole = (run / "samples.jsonl").read_text()
    stages = [json.loads(line)["stage"] for line in whole.splitlines()]
    assert list(dict.fromkeys(stages)) == ["start", "warm-up", "minillm", "teacher"]
    for newest, kept in (("step-5", whole + '{"stage": "mini'), ("step-3", whole[:300]), ("", whole)):
        for path in (run / "checkpoints").iterdir():
            if not newest or int(path.name[5:]) > int(newest[5:]):
                shutil.rmtree(path)
        (run / "samples.jsonl").write_text(kept)
        (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '[1]\n"step"\n{"step": 9')
        assert main(["distill", str(files / "recipe.yaml"), *flags, "--resume", "auto"]) == 0
        assert (run / "samples.jsonl").read_text() == whole
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
            *range(1, 9)
        ]


def test_an_evaluation_of_weights_that_are_trained_again_is_made_again(files, capsys):
    flags = ["--log.checkpoint_every=2", "--log.checkpoints_kept=9"]
    assert main(["distill", str(files / "recipe.yaml"), *flags]) == 0
    for step in (7, 8):
        shutil.rmtree(files / "run" / "checkpoints" / f"step-{step}")
    (files / "run" / "evaluations" / "minillm.json").write_text("{}")  # of weights that nobody has any more
    capsys.readouterr()
    assert main(["distill", str(files / "recipe.yaml"), *flags, "--resume", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "evaluating (minillm)" in printed
    assert "evaluating (warm-up)" not in printed and "evaluating (start)" not in printed
