"""One training step of minillm against TRL's MiniLLMTrainer, on the demo's models; writes results/trl.json.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch trl==1.14.2    # the last release that has the trainer
    python benchmarks/trl_minillm.py --trl-python /tmp/trl/bin/python

Both trainers, in processes of their own and in turns, take the same steps: 8 prompts (the very token ids), one sample
of exactly 32 tokens each from the student alone (TRL cannot mix the teacher in, so alpha is 0), the teacher's scores,
single-step reverse KL + policy gradient with length-normalised return, AdamW on the whole student, fp32, two threads.
TRL runs in its fastest settings: no gradient checkpointing, no bf16, no KL to a reference model, no evaluation, no
checkpoints. Not the same: TRL's return includes the present token, which costs nothing; minillm has no text loss here,
since TRL has none; it packs sequences into shared rows (`data.packing`), which TRL's trainer cannot.

A step's seconds run from the prompts to the updated weights. Memory is the peak of all steps beyond what the process
held when the models were loaded and the trainer made, without the gradients and Adam's two moments, which both must
hold.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

PROMPTS, NEW_TOKENS, STEPS, ROUNDS = 8, 32, 5, 2  # the first step of a process warms up and is left out
LEARNING_RATE = 1e-6
NEVER_SAID = "<jupyter_output>"  # a token of SmolLM2 for source code
RESULTS = Path(__file__).parent / "results" / "trl.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the Python of an environment with trl==1.14.2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(RUNS[options.run](options.folder)))
        return
    if not options.trl_python:
        parser.error("--trl-python: the Python of an environment with trl==1.14.2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        pythons = {"minillm": sys.executable, "trl": options.trl_python}
        runs: dict[str, list[dict]] = {name: [] for name in pythons}
        for _ in range(ROUNDS):
            for trainer, python in pythons.items():
                runs[trainer].append(own_process(python, trainer, folder))
    options.out.write_text(json.dumps(summary(runs), indent=1) + "\n")
    print(options.out.read_text())


def own_process(python: str, trainer: str, folder: Path) -> dict:
    command = [python, __file__, "--run", trainer, "--folder", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{trainer} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians over all steps of all processes, and the ratios that the docs state."""
    rows = {
        trainer: {
            "seconds": round(statistics.median(s for run in found for s in run["seconds"]), 3),
            "all_seconds": [[round(s, 3) for s in run["seconds"]] for run in found],
            "extra_MiB": round(statistics.median(run["extra_bytes"] for run in found) / 2**20, 1),
            "versions": found[0]["versions"],
        }
        for trainer, found in runs.items()
    }
    ours, theirs = rows["minillm"], rows["trl"]
    return {
        "command": "python benchmarks/trl_minillm.py --trl-python PYTHON",
        "threads": torch.get_num_threads(),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "steps": STEPS - 1,
        "processes": ROUNDS,
        "rows": rows,
        "times_faster": round(theirs["seconds"] / ours["seconds"], 2),
        "share_of_memory": round(ours["extra_MiB"] / theirs["extra_MiB"], 2),
    }


# ---- the inputs


def write_inputs(folder: Path) -> None:
    """What both load: student, teacher and tokenizer, and prompts as text that the tokenizer turns into the same ids.

    Its end-of-sequence token is one that no chat model says, so that every sample has its full length.
    """
    from minillm.config.recipe import load_recipe
    from minillm.data.examples import encode, read_records
    from minillm.distillation import load_pair

    path = Path(__file__).parents[1] / "recipes" / "smollm2-cpu.yaml"
    recipe = load_recipe(path)
    student, teacher, tokenizer = load_pair(recipe.run)
    data = recipe.stages["minillm"].data
    assert teacher is not None
    examples = encode(read_records(data.train), tokenizer, recipe.run.data, data, data.train)
    prompts = [example.prompt for example in examples.examples[:PROMPTS]]
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert [tokenizer(text)["input_ids"] for text in texts] == prompts
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer.eos_token = NEVER_SAID
    for name, lm in (("student", student), ("teacher", teacher)):
        lm.model.config.eos_token_id = lm.model.generation_config.eos_token_id = tokenizer.eos_token_id
        lm.model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- the two trainers, each in a process of its own


def run_minillm(folder: Path) -> dict:
    from minillm.config.recipe import load_recipe
    from minillm.distillation import load_pair
    from minillm.run.directory import RunDirectory
    from minillm.train.loop import train
    from minillm.train.preflight import prepare

    config = folder / "minillm.yaml"
    config.write_text(json.dumps({
        "output": str(folder / f"run-{os.getpid()}"),
        "model": {"student": str(folder / "student"), "teacher": str(folder / "teacher")},
        "data": {"train": str(folder / "prompts.jsonl"), "prompt_template": "{prompt}", "packing": True},
        "rollout": {"batch_size": PROMPTS, "max_new_tokens": NEW_TOKENS, "alpha": 0.0, "epochs": 1},
        "objective": {"pt_weight": 0.0},
        "optim": {"steps": STEPS, "batch_size": PROMPTS, "lr": LEARNING_RATE},
        "validation": {"every": 0},
    }))  # fmt: skip
    recipe = load_recipe(config)
    student, teacher, tokenizer = load_pair(recipe.run)
    stage = recipe.stages["minillm"]
    context, run = prepare(recipe.run, stage, student, teacher, tokenizer), RunDirectory(recipe)
    before = held()
    train(context, run, "minillm")
    bytes_ = extra(before, student.model)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["completions/mean_length"] == NEW_TOKENS for line in lines)
    seconds = [line["step_time"] for line in lines[1:]]
    return {"seconds": seconds, "extra_bytes": bytes_, "versions": versions("torch", "transformers")}


def run_trl(folder: Path) -> dict:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        on_step_end = on_step_begin

    settings = MiniLLMConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PROMPTS,
        num_generations=1,
        max_completion_length=NEW_TOKENS,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        gamma=1.0,  # the return of all later tokens
        bf16=False,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = MiniLLMTrainer(
        student,
        teacher,
        args=settings,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
        callbacks=[Clock()],
    )
    before = held()
    trainer.train()
    bytes_ = extra(before, student)
    lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "loss" in line]
    assert lengths == [NEW_TOKENS] * STEPS, lengths
    seconds = [end - start for start, end in zip(marks[2::2], marks[3::2], strict=True)]
    return {"seconds": seconds, "extra_bytes": bytes_, "versions": versions("trl", "torch", "transformers")}


RUNS = {"minillm": run_minillm, "trl": run_trl}

# ---- memory


def held() -> int:
    """Resident bytes now, after free memory went back to the system; the peak is counted from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra(before: int, model: torch.nn.Module) -> int:
    return resident("VmHWM") - before - 3 * sum(x.numel() * x.element_size() for x in model.parameters())


def versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
