"""An evaluation by two processes is that of one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from processes import ROOT

from minillm.cli import main


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_give_the_evaluation_of_one(files):
    """All parts, to the last bit: the same uniforms for each prompt, and the same batches."""
    command = ["evaluate", str(files / "student"), "--teacher", str(files / "teacher"),
               "--data", str(files / "eval.jsonl"), "--eval.batch_size=4", "--eval.samples=2",
               "--eval.sample_tokens=8", "--eval.greedy_tokens=8"]  # fmt: skip
    assert main([*command, "--out", str(files / "one.json")]) == 0
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "minillm", *command, "--out", str(files / "two.json")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    printed = [out for out, _ in said]
    assert "all of it is in" in printed[0] and not printed[1].strip()  # one of them tells
    one, two = (json.loads((files / name).read_text()) for name in ("one.json", "two.json"))
    for found in (one, two):
        del found["seconds"], found["tokens_per_second"], found["command"], found["environment"]
    assert one == two and one["prompts"] == 6
    assert {"reverse_kl", "forward_kl", "rouge_l", "calibration", "exposure_bias", "per_prompt"} <= one.keys()
