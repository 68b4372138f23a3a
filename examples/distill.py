"""Distil a student in Python, in a script or a notebook: two stages, evaluated before and after.

    python examples/distill.py

It writes tiny random models and data first, to have something to run on. For your own, give `minillm.distill` their
directories, hub ids or files, and other steps and lengths.
"""

import json
import tempfile
from pathlib import Path

from tiny import byte_tokenizer, tiny_llama

import minillm
from minillm.distillation import Run


def write_models_and_data(folder: Path) -> None:
    """teacher/ and student/ as `from_pretrained` loads them, and prompts with answers as JSON lines."""
    for name, layers in (("teacher", 3), ("student", 1)):
        tiny_llama(layers, seed=layers).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 21)]
    for name, part in (("train", rows[:14]), ("eval", rows[14:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def distill(folder: Path) -> Run:
    """The student after two stages: word-level distillation, then MiniLLM on responses that it samples."""
    return minillm.distill(
        teacher=folder / "teacher",
        student=folder / "student",
        train=folder / "train.jsonl",
        data={"eval": folder / "eval.jsonl", "max_prompt_length": 64, "max_response_length": 64},
        stages={
            "warm-up": {"method": "kd", "loss": {"distill_weight": 1.0, "label_weight": 0.0}, "optim": {"steps": 40}},
            "minillm": {
                "method": "minillm",
                "rollout": {"batch_size": 8, "max_new_tokens": 12},
                "objective": {"pt_weight": 0},  # no plain text here
                "optim": {"steps": 12},
            },
        },
        optim={"batch_size": 8, "lr": 3e-3},
        eval={"prompts": 6, "sample_tokens": 12, "greedy_tokens": 12},
        output=folder / "run",
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_models_and_data(Path(folder))
        run = distill(Path(folder))
        for stage, evaluation in run.evaluations.items():
            for name, mean in evaluation.means.items():
                print(f"{stage:8}  {name:24}  {mean.mean:7.3f} ± {mean.standard_error:.3f}")
