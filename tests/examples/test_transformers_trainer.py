"""Trainer with our loss: a step of eight sequences is the same however it is cut into micro-batches and processes."""

import os
import socket
import subprocess
import sys

import eager
import pytest
import torch
import transformers_trainer
from tiny import ragged_batch

BATCH = ragged_batch(lengths=(5, 16, 7, 12, 4, 9, 14, 6))
SETTINGS = {"max_steps": 3, "logging_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.0}


def run(output, rows, accumulation):
    student, teacher = eager.models()
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    trainer = transformers_trainer.build(student, teacher, BATCH, str(output), **sizes, **SETTINGS)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.model


def expected():
    student, teacher = eager.models()
    return eager.train(student, teacher, [BATCH] * 3, weight_decay=0.0), student


@pytest.mark.parametrize(("rows", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_accumulation_does_not_change_the_step(rows, accumulation, tmp_path):
    (losses, model), (wanted, reference) = run(tmp_path, rows, accumulation), expected()
    assert losses == pytest.approx(wanted, rel=1e-5)
    eager.assert_same_parameters(model, reference, 1e-5)  # of 9e-3 that three steps can move


def test_the_mean_of_means_is_another_loss():
    student, teacher = eager.models()
    each = [{name: x[i : i + 1] for name, x in BATCH.items()} for i in range(8)]
    means = [eager.reverse_kl(student, teacher, row).item() for row in each]
    assert abs(sum(means) / 8 - eager.reverse_kl(student, teacher, BATCH).item()) > 1e-2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"{rank}.pt")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][-3000:]
    wanted, reference = expected()
    for rank in range(2):
        losses, weights = torch.load(tmp_path / f"{rank}.pt")
        assert losses == pytest.approx(wanted, rel=1e-5)
        student, _ = eager.models()
        student.load_state_dict(weights)
        eager.assert_same_parameters(student, reference, 1e-5)


def test_evaluation_is_the_mean_of_its_batch(tmp_path):
    student, teacher = eager.models()
    trainer = transformers_trainer.build(student, teacher, BATCH, str(tmp_path), per_device_eval_batch_size=8)
    measured = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert measured == pytest.approx(eager.reverse_kl(student, teacher, BATCH).item(), rel=1e-5)


def test_runs_as_a_script():
    eager.run_script("transformers_trainer")


if __name__ == "__main__":
    losses, model = run(os.path.dirname(sys.argv[1]), 2, 2)
    torch.save((losses, getattr(model, "module", model).state_dict()), sys.argv[1])
    torch.distributed.destroy_process_group()  # or the process that ends last finds its peer gone and aborts
