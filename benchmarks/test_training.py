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
from minillm.distillation import load_pair
from minillm.model.sampling import draw_uniforms, sample
from minillm.train.baselines import METHODS
from minillm.train.context import chunks
from minillm.train.loop import Micro, backward, prepare
from minillm.train.minillm import concatenate, policy_terms

pytestmark = pytest.mark.download
RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-cpu.yaml"
PROMPTS, NEW_TOKENS, ROUNDS = 16, 16, 3
NO_END = -1  # every sequence runs its full length: the same number of tokens whoever decodes


@pytest.fixture(scope="module")
def training():
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


def test_rollout(benchmark, training):
    prompts = [example.prompt for example in training.examples[:PROMPTS]]
    uniforms = draw_uniforms(0, NEW_TOKENS, len(prompts))

    def roll(student, teacher, alpha):
        options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": NO_END, "alpha": alpha, "uniforms": uniforms}
        return sample(student, teacher, prompts, vocab_size=training.vocab_size, **options)

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def generate():
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0}
        return training.student.model.generate(ids, attention_mask=mask, pad_token_id=0, **options)

    student, teacher = training.student, training.teacher
    rollout = roll(student, teacher, 0.2)
    with torch.no_grad():  # verified: the log-probabilities kept are those of a forward pass over prompt and response
        batch = training.collate(prompts[:4], rollout.responses()[:4])
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


def test_step(benchmark, training):
    """Forward and backward of one minibatch with its text, and the update, from rollouts that exist already."""
    method = METHODS["minillm"](training, Path())
    parts, _ = method.step(1)
    optimizer = torch.optim.AdamW(training.student.parameters(), lr=0.0, fused=True)
    size = training.config.optim.micro_batch_size
    micros = [Micro(part, rows, *part.make(rows)) for part in parts for rows in chunks(part.rows, size)]
    found: dict[str, float] = {}

    def step():
        found.update(backward(training.student, micros, training.accelerator))
        optimizer.step()
        optimizer.zero_grad()

    benchmark.group = "one optimiser step of MiniLLM"
    benchmark.pedantic(step, rounds=5)
    # verified: ratios are w on the policy that sampled, so its loss is the mean of -min(w R, clip(w) R)
    terms = policy_terms(method.rollout, training.config.objective)
    chosen = concatenate([terms[i] for i in parts[0].rows])
    w, gain = chosen.importance_weights, chosen.advantages
    expected = -torch.minimum(w * gain, w.clamp(0.8, 1.2) * gain).mean()
    assert found["loss/policy"] == pytest.approx(float(expected), rel=1e-2, abs=1e-3)
    tokens = sum(int(micro.batch.attention_mask.sum()) for micro in micros)
    benchmark.extra_info.update(tokens=tokens, threads=torch.get_num_threads())
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median, 1)
