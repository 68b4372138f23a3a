"""What the examples are compared with: reverse KL of two models written out in PyTorch, and a loop over it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    # sys.path: also where the packages are not installed; one thread: two wait for each other on a busy machine
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr


def models():
    return tiny_llama(layers=1, seed=1), tiny_llama(layers=2)


def reverse_kl(student, teacher, batch):
    """The mean over the labels that count."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    log_q = student(**inputs).logits[:, :-1].log_softmax(-1)
    log_p = teacher(**inputs).logits[:, :-1].log_softmax(-1).detach()
    return (log_q.exp() * (log_q - log_p)).sum(-1)[batch["labels"][:, 1:] != -100].mean()


def train(student, teacher, batches, weight_decay=0.01):
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=weight_decay)
    losses = []
    for batch in batches:
        loss = reverse_kl(student, teacher, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_parameters(model, expected, tolerance):
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (x - y).abs().max() <= tolerance, f"{name}: {(x - y).abs().max():.1e}"


def gradients(model):
    found = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    return found
