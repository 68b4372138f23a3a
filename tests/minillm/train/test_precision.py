"""Training that computes in bfloat16 keeps float32 weights, and its ratios compare like with like."""

import json

import pytest
import torch
from safetensors.torch import load_file

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.run.directory import RunDirectory
from minillm.train.loop import METHODS, train
from minillm.train.preflight import prepare

LEARNING_RATE, STEPS = 5e-6, 10  # the default rate: an update of 5e-6 is far below bfloat16's spacing of most weights


def run(files, stage, *flags):
    name = f"run-{len(list(files.iterdir()))}"
    recipe = load_recipe(files / "recipe.yaml", [f"--output={files / name}", *flags])
    student, teacher, tokenizer = load_pair(recipe.run)
    context = prepare(recipe.run, recipe.stages[stage], student, teacher, tokenizer)
    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    directory = RunDirectory(recipe)
    train(context, directory, stage)
    moved = sum(int((p.detach() != before[n]).sum()) for n, p in student.model.named_parameters())
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().split("\n") if line]
    return moved / sum(p.numel() for p in before.values()), [line["loss"] for line in lines], lines


@pytest.mark.parametrize("stage", ["warm-up", "minillm"])
def test_a_bfloat16_run_follows_the_float32_run(files, stage):
    flags = [f"--optim.lr={LEARNING_RATE}", f"--optim.steps={STEPS}", "--objective.pt_weight=0"]
    moved, losses, _ = run(files, stage, *flags)
    moved_bf16, losses_bf16, _ = run(files, stage, *flags, "--model.compute_dtype=bfloat16")
    # tokens without a gradient of their embedding stay: the share is below 1 in both
    assert abs(moved_bf16 - moved) < 0.02 and moved > 0.5
    if stage == "warm-up":  # in the other stage the samples differ
        assert losses_bf16 == pytest.approx(losses, rel=2e-2)


def test_log_probs_of_a_ratio_come_from_one_kind_of_pass(files):
    """On unchanged weights the first update sees its own log-probs: every ratio is 1 / its importance weight's."""
    _, _, lines = run(files, "minillm", "--model.compute_dtype=bfloat16", "--optim.steps=1", "--objective.pt_weight=0")
    assert lines[0]["rollout/logprob_drift"] > 0

    recipe = load_recipe(
        files / "recipe.yaml", ["--model.compute_dtype=bfloat16", f"--output={files / 'x'}", "--objective.pt_weight=0"]
    )
    context = prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
    (part,) = METHODS["minillm"](context, files).step(1).parts
    batch = part.batch(part.examples)
    from minillm_kernels import fused_linear_token_logprobs

    with torch.no_grad(), context.autocast():
        output = context.student.output(batch)
        now = fused_linear_token_logprobs(*output, batch.targets, vocab_size=context.vocab_size)
    # the same pass in batches of other sizes: bfloat16 matmuls may round a little otherwise, decoding by far more
    assert (now - batch.policy.old_logprobs).abs().mean() < 0.2 * lines[0]["rollout/logprob_drift"]


def test_a_rollout_of_the_student_alone_is_kept_in_a_checkpoint(files):
    """Its mixture is the student's law, one tensor under two names."""
    flags = ["--model.compute_dtype=bfloat16", "--rollout.alpha=0", "--optim.steps=1", "--log.checkpoint_every=1"]
    run(files, "minillm", *flags)
    (path,) = files.glob("run-*/checkpoints/step-1")
    memory = load_file(path / "memory.safetensors")
    assert torch.equal(memory["student_logprobs"], memory["mixture_logprobs"])


def test_a_float32_run_needs_no_second_reading(files):
    _, _, lines = run(files, "minillm", "--optim.steps=1")
    assert "rollout/logprob_drift" not in lines[0]


def test_a_frozen_teacher_is_not_cast_token_by_token(files):
    recipe = load_recipe(files / "recipe.yaml", ["--model.compute_dtype=bfloat16"])
    context = prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
    ids = torch.tensor([[1, 2, 3]])
    with context.autocast(), torch.no_grad():
        assert context.teacher.states(ids, torch.ones_like(ids)).dtype == torch.float32
        assert context.teacher.logits(context.teacher.states(ids, None)).dtype == torch.float32
        assert context.student.model.lm_head(context.student.states(ids, None)).dtype == torch.bfloat16
