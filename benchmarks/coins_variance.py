"""What shared coins cost: the variance of MiniLLM's gradient with one coin a row, and with coins that rows share.

The demo pair, the same prompts in every rollout, fresh uniforms each time, and the same ones for all ways. Variance is
the trace of the covariance of the gradient of one matrix of the student, over independent rollouts; its ratio to that
of own coins has the standard error of a jackknife. The result is written anew after every rollout, and the gradients
so far are kept in runs/, where a run that was interrupted, or one of more rollouts, goes on.

    python benchmarks/coins_variance.py [ROLLOUTS]     # 24: 10 minutes on one thread; benchmarks/results/coins.json
"""

from __future__ import annotations

import json
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.files import write_atomically
from minillm.train.context import Context, chunks
from minillm.train.loop import METHODS, Micro, backward
from minillm.train.preflight import prepare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coins.json"
PROMPTS, NEW_TOKENS, ROLLOUTS = 8, 16, 24
WAYS = {"own coins": "row", "4 groups": 4, "1 group": 1}
KEPT = ROOT / "runs" / f"coins-variance-{PROMPTS}-{NEW_TOKENS}.safetensors"
MATRIX = "model.model.layers.18.self_attn.o_proj.weight"


def main() -> None:
    torch.set_num_threads(1)
    rollout = {"max_new_tokens": NEW_TOKENS, "epochs": 1, "batch_size": PROMPTS}
    flags = [f"--stages.minillm.rollout.{key}={value}" for key, value in rollout.items()]
    flags += ["--stages.minillm.objective.pt_weight=0", f"--stages.minillm.optim.batch_size={PROMPTS}"]
    recipe = load_recipe(ROOT / "recipes" / "smollm2-cpu.yaml", flags)
    context = prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
    del context.examples[PROMPTS:]
    for name, parameter in context.student.named_parameters():
        parameter.requires_grad_(name == MATRIX)
    KEPT.parent.mkdir(exist_ok=True)
    found = load_file(KEPT) if KEPT.exists() else {}
    rollouts = int(sys.argv[1]) if len(sys.argv) > 1 else ROLLOUTS
    for iteration in range(len(next(iter(found.values()), [])), rollouts):
        for name, coins in WAYS.items():
            config = replace(context.config, rollout=replace(context.config.rollout, coins=coins))
            mine = gradient(replace(context, config=config), iteration)[None]
            found[name] = torch.cat([found[name], mine]) if iteration else mine
        save_file(found, KEPT.with_suffix(".new"))
        KEPT.with_suffix(".new").replace(KEPT)
        if iteration >= 2:
            write(context, found)


def gradient(context: Context, iteration: int) -> Tensor:
    """Of `MATRIX`, from the rollout of this iteration."""
    parts, _ = METHODS["minillm"](context, Path()).step(iteration + 1)
    size = context.config.optim.micro_batch_size
    examples = [(part, some) for part in parts for some in chunks(part.examples, size)]
    backward(context, context.student, [Micro(part, part.batch(some)) for part, some in examples])
    weight = context.student.get_parameter(MATRIX)
    assert weight.grad is not None
    taken, weight.grad = weight.grad.flatten(), None
    return taken


def variance(gradients: Tensor) -> float:
    """Trace of the covariance of [rollouts, parameters]."""
    return float((gradients - gradients.mean(0)).square().sum() / (len(gradients) - 1))


def ratio(shared: Tensor, own: Tensor) -> tuple[float, float]:
    """Of the variances, with its standard error: rollouts are left out one by one, in both, as they share uniforms."""
    count = len(own)
    rest = [torch.arange(count) != i for i in range(count)]
    without = torch.tensor([variance(shared[kept]) / variance(own[kept]) for kept in rest], dtype=torch.float64)
    error = math.sqrt((count - 1) * float(without.var(correction=0)))
    return variance(shared) / variance(own), error


def write(context: Context, gradients: dict[str, Tensor]) -> None:
    rows = {}
    for name in WAYS:
        found = gradients[name]
        over, error = ratio(found, gradients["own coins"])
        rows[name] = {"variance": variance(found), "over_own_coins": over, "standard_error": error}
    result = {
        "command": "python benchmarks/coins_variance.py", "prompts": PROMPTS, "new_tokens": NEW_TOKENS,
        "rollouts": len(gradients["own coins"]), "alpha": context.config.rollout.alpha, "matrix": MATRIX,
        "torch_version": torch.__version__, "processor": platform.processor() or platform.machine(), "rows": rows,
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result, indent=2) + "\n")
    print(result["rollouts"], {name: (row["over_own_coins"], row["standard_error"]) for name, row in rows.items()})


if __name__ == "__main__":
    main()
