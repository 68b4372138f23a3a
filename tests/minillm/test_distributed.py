"""Two processes on one machine: the same losses and the same weights as one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from minillm.config import load_recipe
from minillm.models import load_model, load_tokenizer
from minillm.run import Run
from minillm.train import prepare, train
from minillm.vocabulary import CausalLM

# one minibatch per pass over the rollouts, so that every process count has the same ones
FLAGS = ["--log.checkpoint_every=0", "--optim.steps=4", "--optim.batch_size=8"]


def run_stages(files, output) -> None:
    """Each stage of the recipe on a fresh student; weights and metrics under `output`."""
    for name, config in load_recipe(files / "recipe.yaml", FLAGS).stages.items():
        run = Run(load_recipe(files / "recipe.yaml", [*FLAGS, f"--output={output / name}"]))
        student, teacher = (CausalLM(load_model(x)) for x in (config.model.student, config.model.teacher))
        train(prepare(config, student, teacher, load_tokenizer(config.model.student)), run, name)
        torch.save([p.detach() for p in student.parameters()], run.path / "weights.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_are_one(files):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(files), str(files / f"rank-{rank}")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][-3000:]
    run_stages(files, files / "alone")
    for stage in ("warm-up", "minillm"):
        alone, shared_work = (
            [json.loads(line) for line in (files / output / stage / "metrics.jsonl").read_text().splitlines()]
            for output in ("alone", "rank-0")
        )
        assert len(alone) == len(shared_work) == 4
        for a, b in zip(alone, shared_work, strict=True):
            assert b["num_tokens"] == a["num_tokens"]
            for name in a.keys() & {"loss", "grad_norm", "kl/reverse", "reward/mean", "completions/mean_length"}:
                assert b[name] == pytest.approx(a[name], rel=1e-3), name
        weights = [torch.load(files / output / stage / "weights.pt") for output in ("alone", "rank-0", "rank-1")]
        for a, b, c in zip(*weights, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
            assert torch.equal(b, c)


if __name__ == "__main__":
    from pathlib import Path

    run_stages(Path(sys.argv[1]), Path(sys.argv[2]))
