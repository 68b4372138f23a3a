"""Two processes on one machine, under the launchers that people use: the same losses and the same weights as one."""

import json
import os
import re
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
from minillm.run.workers import START_SECONDS

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

# accelerate's own --cpu starts one process unless MPI is installed; this way it takes torch's launcher
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port",
]  # fmt: skip
COMPARED = {
    "loss", "grad_norm", "kl/reverse", "reward/mean", "completions/mean_length", "loss/pt", "validation/rouge_l",
    "validation/loss", "rollout/from_teacher", "clip_fraction",
}  # fmt: skip


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def launch(files, command, *flags):
    """Two processes; what the first of them printed."""
    two = subprocess.run(
        [*ACCELERATE, free_port(), "-m", "minillm", command, str(files / "recipe.yaml"), *flags],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert two.returncode == 0, two.stdout[-3000:]
    assert two.stdout.count("summary.json are in") == 1  # only one of them tells


def same_training(one, two):
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b["num_tokens"] == a["num_tokens"]
        assert a.keys() & COMPARED == b.keys() & COMPARED
        for name in a.keys() & COMPARED:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (name, a["step"])
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_two_processes_are_one_and_leave_their_checkpoints_to_one(files):
    """The demo's stages, validated and evaluated; a micro-batch of 1 by one process against 2 at once by two."""
    flags = ["--validation.every=2", "--log.checkpoint_every=3"]
    launch(files, "distill", *flags, f"--output={files / 'two'}")
    alone = [*flags, f"--output={files / 'one'}", "--optim.micro_batch_size=1"]
    assert main(["distill", str(files / "recipe.yaml"), *alone]) == 0
    same_training(files / "one", files / "two")
    summaries = [json.loads((files / name / "summary.json").read_text()) for name in ("one", "two")]
    one, two = (summary["evaluations"] for summary in summaries)
    for timed in ("seconds", "tokens_per_second"):
        del one["start"][timed], two["start"][timed]
    assert one["start"] == two["start"]  # of the same weights, shared: the same to the last bit
    for stage in ("start", "warm-up", "minillm"):
        for along, found in one[stage]["reverse_kl"].items():
            assert two[stage]["reverse_kl"][along]["mean"] == pytest.approx(found["mean"], rel=5e-3)

    shutil.rmtree(files / "two" / "checkpoints" / "step-8")  # step-6 is left, in the middle of the second stage
    flags += [f"--output={files / 'two'}", "--resume", "auto"]
    assert main(["distill", str(files / "recipe.yaml"), *flags]) == 0
    same_training(files / "one", files / "two")


def test_two_processes_are_one_for_every_other_method(files):
    tree = yaml.safe_load((files / "recipe.yaml").read_text())
    warm_up, minillm = tree["stages"]["warm-up"], tree["stages"]["minillm"]
    warm_up["rollout"] = {"max_new_tokens": 6, "on_policy": 0.7}
    minillm["objective"]["variant"] = "reference"
    minillm.setdefault("rollout", {}).update(coins=2, chunk_size=3)
    tree["stages"] = {**{name: {**warm_up, "method": name} for name in ("sft", "seqkd", "gkd")}, "minillm": minillm}
    tree["data"]["packing"] = True
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    launch(files, "train", f"--output={files / 'two'}")
    alone = [f"--output={files / 'one'}", "--optim.micro_batch_size=1"]
    assert main(["train", str(files / "recipe.yaml"), *alone]) == 0
    same_training(files / "one", files / "two")


def bare_workers(*commands, folders=(None, None)):
    """Two processes by torch's rendezvous alone, without a launcher that would end the survivor itself."""
    shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    shared["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        for rank, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]


def training(recipe, *flags):
    return [sys.executable, "-m", "minillm", "train", str(recipe), *flags]


def test_a_worker_that_is_killed_ends_the_other_with_an_error(files):
    flags = ["--stages.minillm.optim.steps=5000", "--log.checkpoint_every=2", f"--output={files / 'cut'}"]
    workers = bare_workers(*[training(files / "recipe.yaml", *flags)] * 2)
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


@pytest.mark.parametrize(
    ("flags", "answer", "differs"),
    [(["--log.checkpoint_every=2"], "a", "recipe"), ([], "b", "data of minillm")],
    ids=["recipe", "data"],
)
def test_processes_that_were_given_something_else_do_not_start(files, flags, answer, differs):
    """Data of one name and two contents, as on two hosts; nothing is written."""
    tree = yaml.safe_load((files / "recipe.yaml").read_text())
    del tree["stages"]["warm-up"], tree["smoke"]
    tree["data"]["train"] = "train.jsonl"
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    folders = [files / "host0", files / "host1"]
    for folder, text in zip(folders, ("a", answer), strict=True):
        folder.mkdir()
        row = json.dumps({"prompt": text, "completion": "b"}) + "\n"
        (folder / "train.jsonl").write_text(row * 12)
    workers = bare_workers(training(files / "recipe.yaml"), training(files / "recipe.yaml", *flags), folders=folders)
    try:
        for worker in workers:
            said = worker.communicate(timeout=300)[0]
            assert worker.returncode == 2, said[-2000:]
            assert f"minillm: process 1 has another {differs} than process 0" in said
    finally:
        for worker in workers:
            worker.kill()
    assert not (files / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_whose_fellows_never_come_gives_up_in_the_time_stated(files, rank):
    """Here of 3 seconds; the other process dies before it has spoken to anybody."""
    code = (
        "import sys\nfrom minillm import cli\nfrom minillm.run import workers\nworkers.START_SECONDS = 3\n"
        f"sys.exit(cli.main({training(files / 'recipe.yaml')[3:]!r}))"
    )
    commands = [[sys.executable, "-c", "import os; os.abort()"]] * 2
    commands[rank] = [sys.executable, "-c", code]
    workers = bare_workers(*commands)
    try:
        said = workers[rank].communicate(timeout=100)[0]
    finally:
        for worker in workers:
            worker.kill()
    assert workers[rank].returncode == 2, said[-2000:]
    assert "minillm: the other processes of this run have not appeared within 3 s" in said


def test_the_time_of_the_start_is_the_one_that_the_documentation_states():
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    assert f"within {START_SECONDS} seconds" in text
