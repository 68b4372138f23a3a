"""Forms of AdamW that hold less memory follow the float32 run, and resume to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, OptimConfig
from minillm.distillation import run_recipe
from minillm.train.optimizers import FORMS, find_optimizer, make_optimizer, take_step

BFLOAT16 = "--model.dtype=bfloat16"
SETTINGS = {  # of a run by each form
    "adamw_stochastic": [BFLOAT16], "adamw_kahan": [BFLOAT16], "adamw_8bit": [BFLOAT16], "adamw_4bit": [],
    "bnb_adamw_8bit": [],
}  # fmt: skip
STEPS = 10


@pytest.fixture
def eager():
    """torchao compiles its update for each shape, which takes a minute here and changes nothing of its meaning."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(params=SETTINGS)
def form(request, eager):
    pytest.importorskip(FORMS[request.param].module, exc_type=ImportError)
    return request.param


def train(files, name, optimizer="adamw", *flags, steps=STEPS):
    """Losses and weights of the kd stage alone."""
    recipe = load_recipe(
        files / "recipe.yaml",
        [f"--output={files / name}", f"--optim.optimizer={optimizer}", f"--optim.steps={steps}", *flags],
    )
    recipe.stages.pop("minillm")
    run = run_recipe(recipe, with_evaluation=False)
    lines = (run.path / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line)["loss"] for line in lines if line], load_file(run.model_path / "model.safetensors")


def test_each_form_follows_the_float32_run(files, form):
    """At a rate whose updates are below the spacing of most bfloat16 weights: plain rounding would keep them all."""
    rate = "--optim.lr=2e-4"
    started = load_file(files / "student" / "model.safetensors")
    losses, weights = train(files, "float32", "adamw", rate)
    found, close = train(files, form, form, rate, *SETTINGS[form])
    assert losses[-1] < losses[0] - 0.05
    assert found[-1] - losses[-1] == pytest.approx(0, abs=0.1 * (losses[0] - losses[-1]))
    moved = {name: (weights[name] - started[name]).flatten() for name in weights}
    ours = {name: (close[name].float() - started[name].bfloat16().float()).flatten() for name in weights}
    if BFLOAT16 not in SETTINGS[form]:
        ours = {name: (close[name] - started[name]).flatten() for name in weights}
    one, other = torch.cat(list(moved.values())), torch.cat(list(ours.values()))
    # along the float32 updates, as far as they went; what rounding adds is across
    assert float(one @ other / (one @ one)) == pytest.approx(1, abs=0.2)


def test_a_resumed_run_is_the_uninterrupted_one(files, form):
    flags = [*SETTINGS[form], "--log.checkpoint_every=3", "--log.checkpoints_kept=9", "--optim.lr=1e-3"]
    _, weights = train(files, "whole", form, *flags, steps=6)
    recipe = load_recipe(
        files / "recipe.yaml", [f"--output={files / 'whole'}", f"--optim.optimizer={form}", "--optim.steps=6", *flags]
    )
    recipe.stages.pop("minillm")
    (checkpoint,) = (files / "whole" / "checkpoints").glob("step-3")
    for _ in range(5):
        torch.rand(1)  # whatever was drawn in between
    again = run_recipe(recipe, with_evaluation=False, resume=str(checkpoint))
    resumed = load_file(again.model_path / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_processes_round_alike(eager):
    """Whatever each has drawn before: the random numbers of an update follow from the seed and the step."""
    pytest.importorskip("torchao.optim", exc_type=ImportError)
    optim, found = OptimConfig(optimizer="adamw_stochastic", lr=1e-3), []
    for process in range(2):
        torch.manual_seed(process)
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 4096).reshape(64, 64).bfloat16())
        optimizer = make_optimizer(optim, [weight])
        for step in range(3):
            weight.grad = torch.ones_like(weight)
            before = torch.get_rng_state()
            take_step(optimizer, optim, 0, step)
            assert torch.equal(torch.get_rng_state(), before)
        found.append(weight.detach().clone())
    assert torch.equal(*found)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    import sys

    for name, form in FORMS.items():
        if name != "adamw":
            monkeypatch.setitem(sys.modules, form.module, None)
            with pytest.raises(ConfigError, match=rf"{name} needs {form.install} .*: pip install {form.install}"):
                find_optimizer(OptimConfig(optimizer=name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([BFLOAT16], "trained weights of 16 bits lose .*adamw_stochastic, adamw_kahan, adamw_8bit"),
        (["--model.dtype=float16", "--optim.optimizer=adamw_kahan"], "model.dtype is float16"),
        ([BFLOAT16, "--optim.optimizer=bnb_adamw_8bit"], "lose most updates to rounding"),
        (["--optim.optimizer=adamw_kahan"], "is for weights trained in bfloat16, not for model.dtype float32"),
        ([BFLOAT16, "--lora.rank=2", "--optim.optimizer=adamw_kahan"], "not for adapters, which are float32"),
        ([BFLOAT16, "--optim.optimizer=adamw_8bit", "--model.compute_dtype=float32"], "compute in bfloat16"),
        (["--optim.optimizer=adam"], "unknown value of optim.optimizer: 'adam'"),
    ],
)
def test_settings_that_do_not_go_together(files, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(files / "recipe.yaml", flags)
