"""Checkpoints: whole or absent, exact to the bit, and what happens when something goes wrong while one is written."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from adapters import needs_adapters
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.distillation import run_recipe
from minillm.model.load import load_model
from minillm.run import checkpoint
from minillm.run.checkpoint import CheckpointError, Progress
from minillm.run.directory import RunDirectory
from minillm.run.interrupt import SIGNALS, Interrupt, Interrupted, exit_on_signal


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(run):
    """What must not depend on having been interrupted: everything but clocks."""
    timed = ("time", "memory/", "step_time", "cpu_time", "tokens_per_second")
    metrics = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows(run / "metrics.jsonl")]
    return metrics, load_file(run / "model" / "model.safetensors")


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.fixture
def flags(files):
    """Ten steps of MiniLLM after three of kd. Rollouts last four steps, so that step 5 of 10 is in the middle."""
    return ["--stages.minillm.optim.steps=10", "--log.checkpoint_every=5", "--log.checkpoints_kept=9", "--log.every=3"]


def resume_from(files, flags, source, checkpoint_name, name):
    """A copy of the run as it was when a checkpoint had just been written, taken up again."""
    copy = files / name
    shutil.copytree(files / source, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > int(checkpoint_name.split("-")[1]):
            shutil.rmtree(path)
    shutil.rmtree(copy / "model")
    recipe = load_recipe(files / "recipe.yaml", [*flags, f"--output={copy}"])
    run_recipe(recipe, "", with_evaluation=False, resume="auto")
    return copy


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--validation.every=2"],
        pytest.param(["--lora.rank=4"], marks=needs_adapters),
        ["--stages.minillm.rollout.max_new_tokens=[[0, 3], [4, 6], [8, 2]]", "--rollout.overlap=1"],
    ],
    ids=["plain", "selection", "lora", "limits ahead"],
)
def test_ten_steps_are_five_and_five_to_the_bit(files, flags, extra):
    flags = flags + extra
    run_recipe(load_recipe(files / "recipe.yaml", [*flags, f"--output={files / 'whole'}"]), "", with_evaluation=False)
    assert {path.name for path in (files / "whole" / "checkpoints").iterdir()} == {"step-3", "step-8", "step-13"}
    whole = results(files / "whole")
    names = ["step-8", "step-3", "step-13"]  # within a stage, between two, and after the last step
    for name in names[: 1 if "--lora.rank=4" in extra else 3]:
        same(results(resume_from(files, flags, "whole", name, f"from-{name}")), whole)


@pytest.mark.parametrize("method", ["sft", "seqkd", "gkd"])
def test_the_other_methods_resume_to_the_bit(files, method):
    flags = [f"--method={method}", "--optim.steps=4", "--log.checkpoint_every=2", "--log.checkpoints_kept=9"]
    flags += ["--optim.batch_size=4", "--rollout.max_new_tokens=4"]
    tree = load_recipe(files / "recipe.yaml", flags)
    recipe_path = files / "one.yaml"
    from minillm.config.recipe import save

    tree.stages.pop("minillm")
    save(tree, recipe_path)
    run_recipe(load_recipe(recipe_path, [f"--output={files / 'whole'}"]), "", with_evaluation=False)
    copy = files / "copy"
    shutil.copytree(files / "whole", copy)
    shutil.rmtree(copy / "checkpoints" / "step-4")
    run_recipe(load_recipe(recipe_path, [f"--output={copy}"]), "", with_evaluation=False, resume="auto")
    same(results(copy), results(files / "whole"))


def test_evaluations_are_paired_across_a_resumption(files, capsys):
    flags = ["--log.checkpoint_every=2", "--log.checkpoints_kept=9"]
    whole = run_recipe(load_recipe(files / "recipe.yaml", [*flags, f"--output={files / 'a'}"])).summary
    shutil.copytree(files / "a", files / "b")
    for step in (7, 8):
        shutil.rmtree(files / "b" / "checkpoints" / f"step-{step}", ignore_errors=True)
    (files / "b" / "evaluations" / "minillm.json").unlink()
    capsys.readouterr()
    again = run_recipe(load_recipe(files / "recipe.yaml", [*flags, f"--output={files / 'b'}"]), resume="auto").summary
    printed = capsys.readouterr().out
    assert "resuming after step 5 from" in printed
    assert "evaluating (minillm)" in printed and "evaluating (start)" not in printed
    for stage in ("start", "warm-up", "minillm"):
        for name, found in whole["evaluations"][stage].items():
            assert name in ("seconds", "tokens_per_second") or again["evaluations"][stage][name] == found
    assert again["changes"] == whole["changes"]


def test_what_a_checkpoint_holds(files, flags):
    run_recipe(load_recipe(files / "recipe.yaml", flags), "", with_evaluation=False)
    path = files / "run" / "checkpoints" / "step-8"
    assert {file.name for file in path.iterdir()} >= {
        "model.safetensors", "optimizer.safetensors", "random.safetensors", "memory.safetensors", "progress.json",
        "DONE",
    }  # fmt: skip
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json", ""}  # nothing that could be a pickle
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, load_file(path / "model.safetensors")["lm_head.weight"])


def test_only_the_newest_are_kept(files):
    flags = ["--log.checkpoint_every=1", "--log.checkpoints_kept=2"]
    run_recipe(load_recipe(files / "recipe.yaml", flags), "", with_evaluation=False)
    assert {path.name for path in (files / "run" / "checkpoints").iterdir()} == {"step-7", "step-8"}


def test_a_checkpoint_of_another_run(files, flags, capsys):
    run_recipe(load_recipe(files / "recipe.yaml", flags), "", with_evaluation=False)
    path = files / "run" / "checkpoints" / "step-8"
    status = main(["train", str(files / "recipe.yaml"), *flags, "--optim.lr=0.5", "--seed=4", "--resume", str(path)])
    error = capsys.readouterr().err
    assert status == 2
    assert "is of another run: seed is 0 there, 4 here" in error
    assert "stages.warm-up.optim.lr is 0.001 there, 0.5 here" in error
    assert f"minillm train {path.parent.parent / 'config.yaml'} --resume {path}" in error
    # the command it names works
    assert main(["train", str(path.parent.parent / "config.yaml"), "--resume", str(path)]) == 0


def test_what_is_no_checkpoint(files, capsys):
    (files / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    for path in (files / "run" / "checkpoints" / "step-1", files / "nowhere"):
        assert main(["train", str(files / "recipe.yaml"), "--resume", str(path)]) == 2
        assert f"no whole checkpoint at {path}" in capsys.readouterr().err


def test_auto_starts_where_there_is_nothing_to_resume(files, capsys):
    assert main(["train", str(files / "recipe.yaml"), "--resume", "auto"]) == 0
    assert "resuming" not in capsys.readouterr().out
    shutil.rmtree(files / "run" / "checkpoints")  # as if it had been killed before its first checkpoint
    before = rows(files / "run" / "metrics.jsonl")
    assert main(["train", str(files / "recipe.yaml"), "--resume", "auto"]) == 0
    assert [row["loss"] for row in rows(files / "run" / "metrics.jsonl")] == [row["loss"] for row in before]


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_no_pickle_is_ever_loaded(files, flags, tmp_path):
    run_recipe(load_recipe(files / "recipe.yaml", flags), "", with_evaluation=False)
    path = files / "run" / "checkpoints" / "step-8"
    for name in ("optimizer.bin", "random_states_0.pkl", "scheduler.bin"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    assert main(["train", str(files / "recipe.yaml"), *flags, "--resume", str(path)]) == 0
    (path / "optimizer.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"is damaged .*optimizer.safetensors"):
        checkpoint.load(path, load_recipe(files / "recipe.yaml", flags))
    model = tmp_path / "pickled"
    shutil.copytree(files / "student", model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match=r"no causal language model could be loaded"):
        load_model(str(model))


@pytest.mark.parametrize("extra", [[], pytest.param(["--lora.rank=4"], marks=needs_adapters)], ids=["plain", "lora"])
def test_any_checkpoint_is_exported_as_a_plain_model(files, flags, extra, capsys):
    """The run's end; an earlier step; and, of a run that was cut short, how far it came."""
    run_recipe(load_recipe(files / "recipe.yaml", flags + extra), "", with_evaluation=False)
    run, step = files / "run", files / "run" / "checkpoints" / "step-8"

    def exported(*arguments, output, source):
        assert main(["export", str(run), *map(str, arguments)]) == 0
        assert f"{output} holds the student of {source}" in capsys.readouterr().out
        assert (output / "adapter" / "adapter_model.safetensors").exists() == bool(extra)
        load_model(str(output))
        return load_file(output / "model.safetensors")

    end = exported(output=run / "export", source=run / "model")
    earlier = exported("--checkpoint", step, "--output", files / "a", output=files / "a", source=step)
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "step-13"
    last = exported("--output", files / "b", output=files / "b", source=newest)
    assert last.keys() == end.keys() and all(torch.equal(last[name], end[name]) for name in end)
    assert any(not torch.equal(last[name], earlier[name]) for name in last)
    shutil.rmtree(run / "checkpoints")
    for arguments, message in (
        ([str(run)], "export is not empty: give another --output"),
        ([str(run), "--output", str(files / "c")], "has not ended and holds no checkpoint yet"),
        ([str(files), "--output", str(files / "c")], "is no run directory"),
        ([str(run), "--checkpoint", str(run), "--output", str(files / "c")], "no whole checkpoint at"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err


# ---- faults


def fake_save(folder, recipe, step, size=1000):
    """A checkpoint of some size, with nothing real in it."""
    from transformers import LlamaConfig

    model = type("M", (), {"config": LlamaConfig()})
    groups = {"model": {"w": torch.full((size,), float(step))}, "optimizer": {"w.exp_avg": torch.zeros(size)}}
    return checkpoint.save(folder, recipe, Progress("minillm", step), groups, model, keep=2)


def test_a_full_disk_keeps_the_checkpoint_before(files, capsys):
    """The limit on file sizes is a real failure of write(2), in the middle of the weights."""
    recipe = load_recipe(files / "recipe.yaml")
    run = RunDirectory(recipe, command="minillm train recipe.yaml")
    folder = run.path / "checkpoints"
    first = fake_save(folder, recipe, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"no checkpoint could be written at step 2: .*{first}, is whole"):
            fake_save(folder, recipe, 2, size=1_000_000)
        groups = {"model": {"w": torch.zeros(1_000_000)}}
        model = type("M", (), {"config": None})
        with pytest.raises(
            CheckpointError, match=rf"Make room, then: Resume with: minillm train recipe.yaml --resume {first}"
        ):
            run.checkpoint(Progress("minillm", 3), groups, model, 2)
        with pytest.raises(CheckpointError, match=r"best.safetensors could not be written: .*--resume auto goes on"):
            checkpoint.write_weights(torch.nn.Linear(1000, 1000), run.path / "best.safetensors")
        assert not list(run.path.glob("*best*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # not even config.yaml
        assert main(["train", str(files / "recipe.yaml"), f"--output={files / 'other'}"]) == 2
        assert "Make room, then --resume auto" in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.iterdir()] == ["step-1"]  # and nothing half-written beside it
    assert checkpoint.load(first, recipe).groups["model"]["w"][0] == 1
    fake_save(folder, recipe, 2, size=1_000_000)
    assert checkpoint.latest(run.path).name == "step-2"


def save_without_end(folder, recipe, announce) -> None:
    for step in range(1, 100_000):
        fake_save(folder, recipe, step, size=4_000_000)
        os.write(announce, f"{step}\n".encode())


def test_killed_while_saving_it_loses_at_most_one_interval(files):
    """kill -9 at twelve moments of an endless series of saves: the newest whole checkpoint is the last one announced,
    or the one after, and it is readable."""
    recipe, folder = load_recipe(files / "recipe.yaml"), files / "killed" / "checkpoints"
    caught_in_the_middle = 0
    for moment in range(12):
        shutil.rmtree(folder, ignore_errors=True)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_without_end(folder, recipe, write)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as announcements:
            announced = int(announcements.readline())
            time.sleep(0.018 * moment)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            announced = max([announced, *map(int, announcements.read().split())])
        caught_in_the_middle += any(path.name.startswith(".") for path in folder.iterdir())
        newest = checkpoint.latest(folder.parent)
        step = int(newest.name.removeprefix("step-"))
        assert announced <= step <= announced + 1
        assert checkpoint.load(newest, recipe).groups["model"]["w"].unique().tolist() == [step]
        fake_save(folder, recipe, step + 1)  # what was left behind is no obstacle
        assert not (folder / f".step-{step + 1}").exists()
    assert caught_in_the_middle  # else this test has shown nothing


def start(files, *flags):
    command = [sys.executable, "-m", "minillm", "train", str(files / "recipe.yaml"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


def test_killed_then_stopped_it_ends_with_the_same_bits(files):
    """kill -9, --resume auto, SIGTERM, the command that it prints; against a run that nothing happened to."""
    flags = ["--stages.minillm.optim.steps=30", "--rollout.epochs=4"]  # far more than pass before a signal arrives
    cut = [*flags, f"--output={files / 'cut'}", "--log.checkpoint_every=2"]
    process = start(files, *cut)
    read_until(process, "minillm  3/30")
    process.kill()
    process.wait()
    assert int(checkpoint.latest(files / "cut").name.removeprefix("step-")) >= 5  # 6 were done, one interval is 2

    process = start(files, *cut, "--resume", "auto")
    assert any("resuming after step" in line for line in read_until(process, "minillm  7/30"))
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    (line,) = [line for line in rest.splitlines() if line.startswith("stopped.")]
    command = line.partition("Resume with: ")[2]
    assert command.startswith("minillm train ") and "--resume" in command
    assert 10 <= int(command.rpartition("step-")[2]) < 33
    assert main(command.split()[1:]) == 0
    run_recipe(load_recipe(files / "recipe.yaml", [*flags, f"--output={files / 'whole'}"]), "", with_evaluation=False)
    same(results(files / "cut"), results(files / "whole"))


def test_sigterm_before_training_ends_at_once(files):
    code = (
        "import sys, os, signal\nfrom minillm import cli, distillation\n"
        "distillation.run_recipe = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(cli.main(['train', {str(files / 'recipe.yaml')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "stopped. Nothing was being trained; --resume auto" in result.stdout


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupts_are_noted_and_the_handler_before_comes_back(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        alone = type("A", (), {"num_processes": 1})
        assert not interrupt.asked(alone)
        os.kill(os.getpid(), number)
        assert interrupt.asked(alone)
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.noted
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_loop_a_signal_ends_the_command_and_leaves_no_handler():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        with pytest.raises(Interrupted, match="--resume auto"), exit_on_signal():
            os.kill(os.getpid(), number)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
