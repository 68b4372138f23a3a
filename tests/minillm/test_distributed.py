"""Two processes on one machine, under the launchers that people use: the same losses and the same weights as one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from minillm.cli import main

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# accelerate's own --cpu starts one process unless MPI is installed; this way it takes torch's launcher
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    "-m", "minillm",
]  # fmt: skip
COMPARED = {
    "loss", "grad_norm", "kl/reverse", "reward/mean", "completions/mean_length", "loss/pt", "validation/rouge_l",
    "validation/loss", "rollout/from_teacher", "clip_fraction",
}  # fmt: skip


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def launch(files, *arguments):
    command = [*ACCELERATE, arguments[0], str(files / "recipe.yaml"), *arguments[1:]]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--validation.every=2"],
        ["--objective.variant=reference", "--stages.warm-up.method=seqkd", "--rollout.max_new_tokens=6"],
        [
            "--stages.warm-up.method=gkd",
            "--rollout.on_policy=0.7",
            "--rollout.max_new_tokens=6",
            "--data.packing=true",
        ],
    ],
    ids=["paper", "reference", "gkd"],
)
def test_two_processes_are_one(files, flags):
    """A whole recipe from the command line: a micro-batch of 1 by one process against 2 at once by two."""
    command = "distill" if "--validation.every=2" in flags else "train"  # evaluation is the same for all
    two = launch(files, command, *flags, f"--output={files / 'two'}")
    said = two.communicate(timeout=500)[0]
    assert two.returncode == 0, said[:3000]
    assert said.count("summary.json are in") == 1  # only one of them tells
    alone = [*flags, f"--output={files / 'one'}", "--optim.micro_batch_size=1"]
    assert main([command, str(files / "recipe.yaml"), *alone]) == 0
    for a, b in zip(metrics(files / "one"), metrics(files / "two"), strict=True):
        assert b["num_tokens"] == a["num_tokens"]
        assert a.keys() & COMPARED == b.keys() & COMPARED
        for name in a.keys() & COMPARED:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (name, a["step"])
    one, two = (load_file(files / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3)
    summaries = [json.loads((files / name / "summary.json").read_text()) for name in ("one", "two")]
    for stage, estimates in summaries[0]["evaluations"].items():
        for name in ("reverse_kl/references", "reverse_kl/own_samples"):
            assert summaries[1]["evaluations"][stage][name]["mean"] == pytest.approx(estimates[name]["mean"], rel=5e-3)


def test_a_checkpoint_of_two_processes_is_taken_up_by_one(files):
    flags = ["--log.checkpoint_every=3", f"--output={files / 'two'}"]
    two = launch(files, "train", *flags)
    assert (two.communicate(timeout=300)[0], two.returncode)[1] == 0
    whole = metrics(files / "two")
    shutil.rmtree(files / "two" / "checkpoints" / "step-8")
    assert main(["train", str(files / "recipe.yaml"), *flags, "--resume", "auto"]) == 0
    again = metrics(files / "two")
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    for a, b in zip(whole, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)


def test_a_worker_that_is_killed_ends_the_other_with_an_error(files):
    """By torch's rendezvous alone, without a launcher that would end the survivor itself."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port + 1
    shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [
        sys.executable,
        "-m",
        "minillm",
        "train",
        str(files / "recipe.yaml"),
        "--stages.minillm.optim.steps=5000",
    ]
    workers = [
        subprocess.Popen(
            [*command, "--log.checkpoint_every=2", f"--output={files / 'cut'}"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for line in workers[0].stdout:
            if re.search(r"minillm  3/", line):
                break
        workers[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        rest = workers[0].communicate(timeout=60)[0]
    finally:
        for worker in workers:
            worker.kill()
    assert workers[0].returncode == 2, rest[-2000:]
    assert time.monotonic() - killed < 60
    assert "minillm: another process of this run has ended" in rest
    assert re.search(r"Resume with: minillm train \S+recipe.yaml .*--resume \S+step-\d+", rest)
    assert "Traceback" not in rest
