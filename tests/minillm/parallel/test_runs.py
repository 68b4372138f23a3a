"""Whole runs with sharded models under torchrun, beside one process; and what is refused before the first step."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.distillation import load_pair, run_recipe
from minillm.parallel.mesh import check_torch
from minillm.run.workers import resume_after_restart
from minillm.train.preflight import prepare


def unavailable() -> str:
    try:
        check_torch()
    except ConfigError as error:
        return str(error)
    return ""


needs_shards = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
needs_tensor_parallelism = pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed") is None, reason="this transformers has no tensor parallelism"
)
COMPARED = {"loss", "grad_norm", "kl/reverse", "reward/mean", "loss/pt", "validation/loss", "validation/rouge_l"}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_training(one, two):
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() & COMPARED == b.keys() & COMPARED
        for name in a.keys() & COMPARED:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (name, a["step"])
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def two_processes(*words):
    """By torchrun."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port,
         "-m", "minillm", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]


@needs_shards
def test_a_sharded_run_is_that_of_one_process_and_goes_on_as_one(files, monkeypatch):
    """Doctor, validation, evaluation, export and checkpoints of two processes; the last stage again by one, whose
    models are whole, as torchrun starts it anew: by the same command."""
    flags = ["--validation.every=2", "--log.checkpoint_every=3"]
    recipe, one, two = str(files / "recipe.yaml"), files / "one", files / "two"
    shards = ["--parallel.student=shard", "--parallel.teacher=shard", f"--output={two}"]
    two_processes("distill", recipe, *flags, *shards)
    assert main(["distill", recipe, *flags, f"--output={one}"]) == 0
    same_training(one, two)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, two)]
    means = [summary["evaluations"]["minillm"]["reverse_kl"]["own_samples"]["mean"] for summary in summaries]
    assert means[1] == pytest.approx(means[0], rel=5e-3)
    names = {path.name for path in (two / "checkpoints" / "step-6").iterdir()}
    assert "model.safetensors" not in names and len({name for name in names if name.startswith("shard-")}) == 2

    assert main(["export", str(two), "--checkpoint", str(two / "checkpoints" / "step-8")]) == 0
    exported = load_file(two / "export" / "model.safetensors")
    assert exported.keys() == load_file(two / "model" / "model.safetensors").keys()

    shutil.rmtree(two / "checkpoints" / "step-8")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["distill", recipe, *flags, f"--output={two}"]) == 0
    same_training(one, two)


@needs_shards
@needs_tensor_parallelism
def test_a_run_beside_a_tensor_parallel_teacher_is_that_of_one_process(files):
    """Doctor, rollouts and validation; the student is cut from the teacher while that is whole."""
    tree = yaml.safe_load((files / "recipe.yaml").read_text())
    tree["stages"] = {name: stage for name, stage in tree["stages"].items() if stage["method"] == "minillm"}
    tree["model"] = {"teacher": tree["model"]["teacher"], "drop_layers": [1, 2]}
    tree["smoke"]["stages"] = {}
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    command = ["train", str(files / "recipe.yaml"), "--validation.every=2"]
    two_processes(*command, "--parallel.teacher=tensor", f"--output={files / 'two'}")
    assert main([*command, f"--output={files / 'one'}"]) == 0
    same_training(files / "one", files / "two")


def test_a_run_that_torchrun_starts_again_resumes_its_newest_checkpoint(monkeypatch):
    assert resume_after_restart("run/checkpoints/step-5") == "run/checkpoints/step-5"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert resume_after_restart("") == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert resume_after_restart("") == resume_after_restart("run/checkpoints/step-5") == "auto"


@needs_shards
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_worker_that_is_killed_is_started_again_by_torchrun(files):
    """The survivor ends with a status that torchrun counts; all start again, and resume by themselves."""
    tree = yaml.safe_load((files / "recipe.yaml").read_text())
    tree["stages"] = {"warm-up": tree["stages"]["warm-up"] | {"optim": {"steps": 40, "batch_size": 4, "lr": 1e-3}}}
    tree |= {"log": {"checkpoint_every": 2}, "parallel": {"student": "shard"}}
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    written, log = files / "run" / "metrics.jsonl", files / "log"
    with log.open("w") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             "--max_restarts", "1", "-m", "minillm", "train", str(files / "recipe.yaml")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while not (written.exists() and len(written.read_text().splitlines()) >= 5):
            assert agent.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.05)
        os.kill(worker_of(agent.pid, rank=1), signal.SIGKILL)
        assert agent.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        agent.kill()
    assert "resuming after step" in log.read_text()
    assert [line["step"] for line in metrics(files / "run")] == list(range(1, 41))


def worker_of(agent: int, rank: int) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and f"\0LOCAL_RANK={rank}\0" in f"\0{(process / 'environ').read_text()}":
                return int(process.name)
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    raise AssertionError(f"torchrun has no worker {rank}")


@needs_shards
@pytest.mark.parametrize("method", ["kd", "minillm"])
def test_one_process_offloads_its_teacher(files, method):
    """Layer by layer, or gathered for a rollout that mixes it in; the same losses."""
    tree = yaml.safe_load((files / "recipe.yaml").read_text())
    (name,) = (name for name, stage in tree["stages"].items() if stage["method"] == method)
    tree["stages"] = {name: tree["stages"][name]}
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    code = "import sys; from minillm.cli import main; sys.exit(main(sys.argv[1:]))"
    for where in ("offload", "replicate"):  # in a process of its own, since it starts a process group
        command = ["train", str(files / "recipe.yaml"), f"--parallel.teacher={where}", f"--output={files / where}"]
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    same_training(files / "replicate", files / "offload")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parallel.student=fsdp"], "value of parallel.student: 'fsdp'"),
        (["--parallel.teacher=pipeline"], "value of parallel.teacher: 'pipeline'"),
        (["--parallel.teacher=shard", "--rollout.engine=vllm"], "an engine is given whole weights"),
        (["--parallel.hosts=0"], "parallel.hosts is 0"),
        (["--parallel.hosts=2"], "nothing is sharded"),
        (["--parallel.student=shard", "--model.compute_dtype=float16"], "does not compute in float16"),
        (["--parallel.student=shard", "--optim.optimizer=adamw_8bit"], "trains by adamw alone"),
        (["--parallel.teacher=tensor", "--model.head=logits"], "whole rows of logits"),
        (["--parallel.teacher=shard", "--model.teacher=", "--stages.warm-up.method=sft"], "there is no model.teacher"),
        (["--stages.minillm.parallel.student=shard"], "cannot differ between stages"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(files, flags, told):
    with pytest.raises(ConfigError, match="parallel") as error:
        load_recipe(files / "recipe.yaml", flags)
    assert told in str(error.value)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"])
def test_accelerate_launched_to_shard_is_refused(files, monkeypatch, name):
    """On a CPU accelerate would go on without sharding, and say nothing."""
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=r"set parallel\.student to shard"):
        run_recipe(load_recipe(files / "recipe.yaml"))
    assert not (files / "run").exists()


def test_loss_scaling_of_the_launcher_is_refused_with_shards(files, monkeypatch):
    monkeypatch.setattr("minillm.train.preflight.compute_dtype", lambda run, accelerator: torch.float16)
    recipe = load_recipe(files / "recipe.yaml", ["--parallel.student=shard"])
    with pytest.raises(ConfigError, match=r"parallel\.student shard does not compute in float16"):
        prepare(recipe.run, recipe.stages["warm-up"], *load_pair(recipe.run))


def test_hosts_that_do_not_divide_the_processes_are_refused(files):
    recipe = load_recipe(files / "recipe.yaml", ["--parallel.student=shard", "--parallel.hosts=2"])
    with pytest.raises(ConfigError, match=r"parallel\.hosts is 2, which does not divide the 1 processes"):
        prepare(recipe.run, recipe.stages["warm-up"], *load_pair(recipe.run))
