"""What shared coins cost: the variance of MiniLLM's gradient with one coin a row, and with coins that rows share.

The demo pair, the same prompts in every rollout, fresh uniforms each time. Variance is the trace of the covariance of
the gradient of one matrix in the student's middle, over independent rollouts; its ratio to that of own coins has the
standard error of a jackknife. Run again after an interruption, it goes on from the rollouts it has written.

    python benchmarks/coins_variance.py          # 15 minutes on two cores; benchmarks/results/coins.json
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import torch
from test_training import RECIPE

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.files import write_atomically
from minillm.train.context import chunks
from minillm.train.loop import METHODS, Micro, backward
from minillm.train.preflight import prepare

PROMPTS, NEW_TOKENS, ROLLOUTS = 8, 32, 40
WAYS = {"row": "row", "4 groups": 4, "1 group": 1}
RESULTS = Path(__file__).parent / "results" / "coins.json"
MATRIX = "model.model.layers.12.self_attn.o_proj.weight"
GRADIENTS = Path("runs/coins-variance.pt")


def gradient(context, iteration: int) -> torch.Tensor:
    """Of `MATRIX`, from the rollout of this iteration."""
    parts, _ = METHODS["minillm"](context, Path()).step(iteration + 1)
    size = context.config.optim.micro_batch_size
    backward(
        context,
        context.student,
        [Micro(part, part.batch(examples)) for part in parts for examples in chunks(part.examples, size)],
    )
    found = context.student.get_parameter(MATRIX).grad.flatten().clone()
    context.student.zero_grad()
    return found


def variance(gradients: torch.Tensor) -> float:
    """Trace of the covariance of [R, P]."""
    return float((gradients - gradients.mean(0)).square().sum() / (len(gradients) - 1))


def main() -> None:
    known = torch.load(GRADIENTS, weights_only=True) if GRADIENTS.exists() else {name: [] for name in WAYS}
    for name, coins in WAYS.items():
        rollout = {"max_new_tokens": NEW_TOKENS, "epochs": 1, "batch_size": PROMPTS, "coins": coins}
        flags = [f"--stages.minillm.rollout.{key}={value}" for key, value in rollout.items()]
        flags += ["--stages.minillm.objective.pt_weight=0", f"--stages.minillm.optim.batch_size={PROMPTS}"]
        recipe = load_recipe(RECIPE, flags)
        context = prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
        del context.examples[PROMPTS:]
        while len(known[name]) < ROLLOUTS:
            known[name].append(gradient(context, len(known[name])))
            GRADIENTS.parent.mkdir(exist_ok=True)
            torch.save(known, GRADIENTS)
    rows = {}
    own, count = torch.stack(known["row"]), ROLLOUTS
    for name in WAYS:
        found = torch.stack(known[name])
        ratio = variance(found) / variance(own)
        without = [variance(found[torch.arange(count) != i]) / variance(own) for i in range(count)]
        without += [variance(found) / variance(own[torch.arange(count) != i]) for i in range(count)]
        error = math.sqrt((count - 1) / count * sum((value - ratio) ** 2 for value in without))
        rows[name] = {
            "variance": variance(found),
            "over_own_coins": ratio,
            "standard_error": error if name != "row" else 0.0,
        }
    result = {
        "command": "python benchmarks/coins_variance.py",
        "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "rollouts": ROLLOUTS, "alpha": 0.2,
        "torch_version": torch.__version__, "processor": platform.processor() or platform.machine(), "rows": rows,
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
