"""AdamW by name: torch's own, and forms of it that hold less memory, by the libraries that have them.

Trained weights of 16 bits lose updates below their spacing to rounding. Two forms keep them: stochastic rounding,
which rounds up as often as the remainder says, and Kahan summation, which carries the remainder to the next update.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from minillm.config.check import OPTIMIZERS
from minillm.config.schema import ConfigError, OptimConfig


class Form(NamedTuple):
    module: str
    name: str
    """Of the class in it."""
    install: str
    settings: dict[str, Any]
    draws: bool = False
    """Whether an update draws random numbers."""


_ROUNDED: dict[str, Any] = {"bf16_stochastic_round": True}  # where the weights are bfloat16
FORMS = {
    "adamw": Form("torch.optim", "AdamW", "torch", {"fused": True}),
    "adamw_stochastic": Form("torchao.optim", "_AdamW", "torchao", _ROUNDED, draws=True),
    "adamw_kahan": Form("optimi", "AdamW", "torch-optimi", {"kahan_sum": True, "eps": 1e-8}),
    "adamw_8bit": Form("torchao.optim", "AdamW8bit", "torchao", _ROUNDED, draws=True),
    "adamw_4bit": Form("torchao.optim", "AdamW4bit", "torchao", _ROUNDED, draws=True),
    "bnb_adamw_8bit": Form("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", {}),
    "bnb_paged_adamw_8bit": Form("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes", {}),
}
assert tuple(FORMS) == OPTIMIZERS


def find_optimizer(optim: OptimConfig) -> Callable[..., Optimizer]:
    """The class named in the configuration. Raises ConfigError, with the command, where its library is not here."""
    form = FORMS[optim.optimizer]
    try:
        return getattr(import_module(form.module), form.name)
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(
            f"optim.optimizer {optim.optimizer} needs {form.install} ({error}): pip install {form.install}"
        ) from error


def make_optimizer(optim: OptimConfig, parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    """The optimiser of a stage, on the parameters that are trained."""
    settings = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    return find_optimizer(optim)(list(parameters), **settings, **FORMS[optim.optimizer].settings)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # of compiled optimisers
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def take_step(optimizer: Optimizer, optim: OptimConfig, seed: int, step: int) -> None:
    """One update. What it draws follows from the seed and the step's number: all processes round alike, and a resumed
    run as the one that was not interrupted."""
    if not FORMS[optim.optimizer].draws:
        optimizer.step()
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + step)
        optimizer.step()
