"""The loop on a tiny pair: what it leaves behind, that it learns, and that how the work is split changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from adapters import needs_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, OptimConfig, StageConfig
from minillm.distillation import run_recipe
from minillm.evaluation.divergence import draw
from minillm.model.head import CausalLM
from minillm.model.load import load_model, load_student, load_tokenizer
from minillm.run.directory import RunDirectory
from minillm.train import loop, preflight
from minillm.train.loop import METHODS
from minillm.train.preflight import prepare

METRICS = {
    "stage", "step", "loss", "grad_norm", "learning_rate", "num_tokens", "step_time", "cpu_time",
    "tokens_per_second",
    "loss/policy", "loss/single_step", "loss/pt", "kl/reverse", "entropy", "clip_fraction", "reward/mean",
    "rollout/from_teacher", "completions/mean_length", "time/rollout", "time/score", "time/update",
    "memory/rollout", "memory/update",
}  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage(files, name, **sections):
    """The context of one stage of the recipe, with keys replaced."""
    flags = [f"--{k}={v}" for k, v in sections.items() if not isinstance(v, dict)]
    flags += [f"--{s}.{k}={v}" for s, keys in sections.items() if isinstance(keys, dict) for k, v in keys.items()]
    recipe = load_recipe(files / "recipe.yaml", flags)
    run = recipe.run
    teacher = CausalLM(load_model(run.model.teacher), run.model.head)
    student = CausalLM(load_student(run, teacher.model), run.model.head)
    return prepare(run, recipe.stages[name], student, teacher, load_tokenizer(run.model.student))


def new_run(files, name="again"):
    return RunDirectory(load_recipe(files / "recipe.yaml", [f"--output={files / name}"]))


def test_a_distillation_leaves_everything_behind(files, capsys):
    finished = run_recipe(load_recipe(files / "recipe.yaml"), "minillm distill recipe.yaml")
    run = files / "run"
    assert finished.path == run and finished.model_path == run / "model"
    metrics = rows(run / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in metrics] == [
        *(("warm-up", i) for i in (1, 2, 3)),
        *(("minillm", i) for i in (4, 5, 6, 7, 8)),
    ]
    assert metrics[-1].keys() == METRICS
    rolled_out = [row["time/rollout"] > 0 for row in metrics[3:]]
    assert rolled_out == [True, False, False, False, True]  # 8 rollouts × 2 epochs / 4 per step

    assert list(yaml.safe_load((run / "config.yaml").read_text())["stages"]) == ["warm-up", "minillm"]
    assert {"torch", "kernel_backends", "threads"} <= json.loads((run / "environment.json").read_text()).keys()
    assert {row["stage"] for row in rows(run / "samples.jsonl")} == {"start", "warm-up", "minillm", "teacher"}
    assert (run / "checkpoints" / "step-8" / "DONE").exists()
    assert (run / "checkpoints" / "step-8" / "model.safetensors").exists()

    written = json.loads((run / "summary.json").read_text())
    assert written == json.loads(json.dumps(finished.summary))
    for stage in ("start", "warm-up", "minillm"):
        assert {"own_samples", "references"} == written["evaluations"][stage]["reverse_kl"].keys()
        assert len(written["evaluations"][stage]["responses"]) == 4
    assert written["evaluations"]["teacher"]["rouge_l"]["greedy"]["prompts"] == 6
    assert written["changes"]["minillm"]["reverse_kl/own_samples"]["standard_error"] > 0
    assert written["student"]["attention"] == written["teacher"]["attention"] == "sdpa"

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("[user]Hi>", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert "minillm distill recipe.yaml" in (run / "model" / "README.md").read_text()

    printed = capsys.readouterr().out
    assert "warm-up: 14 of 14 records" in printed and "chunks of text" in printed
    assert "[user]Say the letter a 1 times>⟦a<eos>⟧" in printed  # one example with its loss mask
    assert "minillm  5/5  loss" in printed and "left" in printed
    assert "reverse KL, own samples" in printed and "change in minillm" in printed


def test_the_same_seed_gives_the_same_run(files):
    def losses(name):
        run_recipe(load_recipe(files / "recipe.yaml", [f"--output={files / name}"]), "", with_evaluation=False)
        return [row["loss"] for row in rows(files / name / "metrics.jsonl")]

    assert losses("a") == losses("b")


@pytest.mark.parametrize("name", ["warm-up", "minillm"])
def test_the_micro_batch_size_changes_nothing(files, name):
    # answers of unequal lengths: a mean of means would differ
    def weights(size):
        context = stage(files, name, optim={"steps": 2, "batch_size": 8, "micro_batch_size": size})
        loop.train(context, new_run(files, f"micro-{size}"), name)
        return torch.cat([p.detach().flatten() for p in context.student.parameters()])

    whole, single = weights(8), weights(1)
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=2e-5)


def test_the_gradient_is_that_of_the_mean_over_all_tokens(files):
    """One sft step with plain SGD-like bookkeeping: the loop's loss against transformers' own, token for token."""
    context = stage(files, "warm-up", method="sft", optim={"steps": 1, "batch_size": 4, "micro_batch_size": 3})
    (part,) = METHODS["sft"](context, files).step(1).parts
    batches = [part.batch(part.examples[:3]), part.batch(part.examples[3:])]
    ids = [row[: int(n)] for b in batches for row, n in zip(b.input_ids, b.attention_mask.sum(1), strict=True)]
    total, count = 0.0, 0
    starts = [int(row.nonzero()[0]) for b in batches for row in b.predict]
    with torch.no_grad():
        for row, start in zip(ids, starts, strict=True):
            labels = row.clone()
            labels[: start + 1] = -100
            tokens = int((labels != -100).sum())
            total += context.student.model(row[None], labels=labels[None]).loss.item() * tokens
            count += tokens
    loop.train(context, new_run(files), "sft")
    assert rows(files / "again" / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_learning_from_answers(files, method):
    context = stage(files, "warm-up", method=method, optim={"steps": 15, "batch_size": 7, "lr": 1e-2})
    loop.train(context, new_run(files), method)
    losses = [row["loss"] for row in rows(files / "again" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]


def test_minillm_lowers_the_reverse_kl_on_its_own_samples(files):
    context = stage(
        files,
        "minillm",
        rollout={"batch_size": 14, "epochs": 2},
        objective={"pt_weight": 0.0},
        optim={"steps": 16, "batch_size": 7, "lr": 3e-3},
        log={"checkpoint_every": 0},
    )

    def objective():
        args = (context.student, context.teacher, context.examples, context.run.eval)
        drawn = draw(*args, context.ends)
        return drawn.per_token(drawn.to_other).mean

    before = objective()
    loop.train(context, new_run(files), "minillm")
    assert objective() < 0.9 * before
    assert "loss/pt" not in rows(files / "again" / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    "off",
    [{"single_step": False}, {"importance_weights": False}, {"length_norm": False}, {"clip_range": 0.0}],
)
def test_each_strategy_can_be_switched_off_alone(files, off):
    context = stage(files, "minillm", objective=off, optim={"steps": 2})
    loop.train(context, new_run(files), "minillm")
    last = rows(files / "again" / "metrics.jsonl")[-1]
    assert torch.isfinite(torch.tensor(last["loss"]))
    assert (last["loss/single_step"] == 0) == ("single_step" in off)


@pytest.mark.parametrize("method", ["sft", "kd", "minillm"])
def test_without_fused_heads_the_same_is_learnt(files, method):
    """`model.head: logits` goes through the models' own forward, from the rollout to the update."""

    def weights(head):
        name = "minillm" if method == "minillm" else "warm-up"
        context = stage(files, name, method=method, optim={"steps": 2}, model={"head": head})
        loop.train(context, new_run(files, head), method)
        return torch.cat([p.detach().flatten() for p in context.student.parameters()])

    torch.testing.assert_close(weights("logits"), weights("fused"), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("lora", [0, pytest.param(4, marks=needs_adapters)])
def test_recomputed_layers_train_to_the_same_bits(files, lora):
    def weights(recompute):
        settings = {"model": {"recompute": recompute}, "lora": {"rank": lora}, "optim": {"steps": 3}}
        context = stage(files, "minillm", **settings)
        (part, _), saved = METHODS["minillm"](context, files).step(1).parts, []
        batch = part.batch(part.examples)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
            part.loss(context.student.output(batch), batch)
        loop.train(context, new_run(files, f"recompute-{recompute}"), "minillm")
        return sum(saved), [p.detach() for p in context.student.parameters()]

    (whole, expected), (fewer, found) = weights(False), weights(True)
    assert fewer < 0.5 * whole
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(files):
    context = stage(files, "warm-up")
    with torch.no_grad():
        context.student.model.lm_head.weight[5, 5] = float("nan")
    before = [p.clone() for p in context.student.parameters()]
    with pytest.raises(FloatingPointError, match=r"warm-up, step 1: loss nan.*not updated"):
        loop.train(context, new_run(files), "warm-up")
    for old, new in zip(before, context.student.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(9), new.nan_to_num(9))


@pytest.mark.parametrize(
    ("kind", "processes", "message"),
    [
        ("FSDP", 2, "FSDP of accelerate shards the student.*set parallel.student to shard"),
        ("DEEPSPEED", 2, "shards the student"),
        ("MULTI_GPU", 3, "optim.batch_size is 4, which 3 processes cannot share equally"),
    ],
)
def test_what_would_not_train_the_same_model_is_refused(files, monkeypatch, kind, processes, message):
    accelerator = SimpleNamespace(distributed_type=preflight.DistributedType[kind], num_processes=processes)
    monkeypatch.setattr(preflight, "Accelerator", lambda **settings: accelerator)
    with pytest.raises(ConfigError, match=message):
        stage(files, "warm-up")


def test_learning_rate_schedules():
    def factors(schedule):
        optim = OptimConfig(steps=6, warmup_steps=2, schedule=schedule)
        return [round(loop.lr_factor(step, optim), 3) for step in range(1, 7)]

    assert factors("constant") == [0.5, 1, 1, 1, 1, 1]
    assert factors("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors("cosine") == [0.5, 1, 1, 0.854, 0.5, 0.146]


def test_methods_of_the_loop_are_those_of_the_config():
    from minillm.config import check

    assert tuple(METHODS) == check.METHODS
    assert StageConfig().method in METHODS
