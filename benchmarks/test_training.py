"""The trainer on the demo pair: rollouts, and an optimiser step from rollouts that exist.

SmolLM2-135M-Instruct and its cut of 24 layers, as in recipes/smollm2-cpu.yaml (fetched on first use). A rollout runs
both models a token: what it may cost is measured beside it, in turns, as what each model takes to decode alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillm.config.recipe import load_recipe
from minillm.data.examples import PolicyConstants, collate
from minillm.distillation import load_pair
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.train.context import chunks
from minillm.train.loop import METHODS, Micro, backward
from minillm.train.preflight import prepare

pytestmark = pytest.mark.download
RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-cpu.yaml"
PROMPTS, NEW_TOKENS, ROUNDS = 16, 16, 3
NO_END = -1  # every sequence runs its full length: the same number of tokens whoever decodes


@pytest.fixture(scope="module")
def context():
    recipe = load_recipe(
        RECIPE, [f"--rollout.max_new_tokens={NEW_TOKENS}", "--rollout.epochs=1", "--rollout.batch_size=8"]
    )
    return prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each, in turns: seconds long, every one of them is hit by whatever else the machine does."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def test_rollout(benchmark, context):
    prompts = [example.prompt for example in context.examples[:PROMPTS]]
    uniforms = draw_uniforms(0, NEW_TOKENS, len(prompts))

    def roll(student, teacher, alpha):
        options = {"alpha": alpha, "uniforms": uniforms, "vocab_size": context.vocab_size}
        return sample(student, teacher, prompts, Decoding(NEW_TOKENS, [NO_END]), **options)

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def generate():
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0}
        return context.student.model.generate(ids, attention_mask=mask, pad_token_id=0, **options)

    student, teacher = context.student, context.teacher
    rollout = roll(student, teacher, 0.2)
    with torch.no_grad():  # verified: the log-probabilities kept are those of a forward pass over prompt and response
        batch = collate(prompts[:4], rollout.responses()[:4])
        again = student.logits(student.output(batch).states).log_softmax(-1)[range(len(batch.targets)), batch.targets]
    torch.testing.assert_close(rollout.student_logprobs[:4].flatten(), again, rtol=1e-3, atol=1e-3)

    benchmark.group = "rollout of both models"
    benchmark.pedantic(roll, args=(student, teacher, 0.2), rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = in_turns(
        {
            "both_models": lambda: roll(student, teacher, 0.2),
            "student_alone": lambda: roll(student, None, 0.0),
            "teacher_alone": lambda: roll(teacher, None, 0.0),
            "generate_student": generate,
        },
        ROUNDS,
    )
    tokens = len(prompts) * NEW_TOKENS
    alone = seconds["student_alone"] + seconds["teacher_alone"]
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        sequences=len(prompts),
        new_tokens=NEW_TOKENS,
        tokens_per_second={name: round(tokens / value, 1) for name, value in seconds.items()},
        seconds={name: round(value, 3) for name, value in seconds.items()},
        both_over_sum_of_alone=round(seconds["both_models"] / alone, 3),
    )
    assert seconds["both_models"] <= 1.25 * alone


def test_step(benchmark, context):
    """Forward and backward of one minibatch with its text, and the update, from rollouts that exist already."""
    method = METHODS["minillm"](context, Path())
    parts, _ = method.step(1)
    optimizer = torch.optim.AdamW(context.student.parameters(), lr=0.0, fused=True)
    size = context.config.optim.micro_batch_size
    micros = [Micro(part, part.batch(examples)) for part in parts for examples in chunks(part.examples, size)]
    found: dict[str, float] = {}

    def step():
        found.update(backward(context, context.student, micros))
        optimizer.step()
        optimizer.zero_grad()

    benchmark.group = "one optimiser step of MiniLLM"
    benchmark.pedantic(step, rounds=5)
    # verified: ratios are w on the policy that sampled, so its loss is the mean of -min(w R, clip(w) R)
    policy = PolicyConstants.concatenate([example.policy for example in parts[0].examples])
    w, gain = policy.importance_weights, policy.advantages
    expected = -torch.minimum(w * gain, w.clamp(0.8, 1.2) * gain).mean()
    assert found["loss/policy"] == pytest.approx(float(expected), rel=1e-2, abs=1e-3)
    tokens = sum(int(micro.batch.attention_mask.sum()) for micro in micros)
    benchmark.extra_info.update(tokens=tokens, threads=torch.get_num_threads())
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median, 1)
