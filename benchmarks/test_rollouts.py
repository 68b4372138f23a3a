"""Rollouts on the demo pair: side by side, coins first, with responses that end, against what bounds them.

SmolLM2-135M-Instruct and its cut of 24 layers, as in recipes/smollm2-cpu.yaml (fetched on first use). Everything is
timed in turns, in one run, and the least of a few rounds is kept. The floor of coins first is the student decoding
alone and the teacher reading the responses once. The results:

    pytest benchmarks/test_rollouts.py --benchmark-only --benchmark-json=benchmarks/results/rollouts.json
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_training import RECIPE, in_turns

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.model.coins import share_coins
from minillm.model.rollout import add_teacher
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.train.preflight import prepare

pytestmark = pytest.mark.download
PROMPTS, NEW_TOKENS, ALPHA, ROUNDS = 16, 48, 0.2, 3
FREE = Decoding(NEW_TOKENS, ends=())


@pytest.fixture(scope="module")
def context():
    recipe = load_recipe(RECIPE, [f"--rollout.max_new_tokens={NEW_TOKENS}"])
    return prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))


def ends_for(rollout, share: float) -> list[int]:
    """Tokens that would end the responses of a rollout after this share of its limit, in the mean: the frequent ones,
    but for those that would end them sooner."""
    responses, ends = rollout.responses(), []
    for token, _ in Counter(token for response in responses for token in response).most_common():
        tried = {*ends, token}
        lengths = [next((i + 1 for i, t in enumerate(r) if t in tried), len(r)) for r in responses]
        if sum(lengths) >= share * NEW_TOKENS * len(responses):
            ends.append(token)
    return ends


def test_rollouts(benchmark, context):
    prompts = [example.prompt for example in context.examples[:PROMPTS]]
    student, teacher = context.student, context.teacher
    own = draw_uniforms(0, NEW_TOKENS, len(prompts))
    shared = share_coins(own, 1)

    def roll(decoding=FREE, teacher=teacher, alpha=ALPHA, uniforms=own):
        return sample(
            student, teacher, prompts, decoding, alpha=alpha, uniforms=uniforms, vocab_size=context.vocab_size
        )

    beside, first = roll(uniforms=shared), roll(replace(FREE, coins_first=True), uniforms=shared)
    # verified: of 768 tokens few differ, where rounding turns one over and what follows with it; states are the same
    same = (beside.token_ids == first.token_ids).all(dim=1)
    assert same.float().mean() >= 0.8
    torch.testing.assert_close(first.teacher_hidden[same], beside.teacher_hidden[same], rtol=1e-2, atol=1e-2)
    ending = replace(FREE, ends=ends_for(beside, 1 / 3))
    short = roll(ending, uniforms=shared)
    assert 0.3 < float(short.lengths.float().mean()) / NEW_TOKENS < 0.4

    student_only = roll(teacher=None, alpha=0.0)
    functions = {
        "side_by_side": roll,
        "coins_first": lambda: roll(replace(FREE, coins_first=True), uniforms=shared),
        "student_alone": lambda: roll(teacher=None, alpha=0.0),
        "teacher_reads": lambda: add_teacher(student_only, teacher, 1.0, context.vocab_size, 0),
        "side_by_side_ending": lambda: roll(ending, uniforms=shared),
        "coins_first_ending": lambda: roll(replace(ending, coins_first=True), uniforms=shared),
    }
    benchmark.group = "rollouts"
    benchmark.pedantic(functions["coins_first"], rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = in_turns(functions, ROUNDS)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        sequences=len(prompts),
        new_tokens=NEW_TOKENS,
        alpha=ALPHA,
        teacher_turns=int((shared[:, 0, 0] < ALPHA).sum()),
        mean_length_ending=round(float(short.lengths.float().mean()), 1),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        coins_first_over_floor=round(
            seconds["coins_first"] / (seconds["student_alone"] + seconds["teacher_reads"]), 3
        ),
        side_by_side_over_coins_first=round(seconds["side_by_side"] / seconds["coins_first"], 3),
        full_length_over_ending=round(seconds["side_by_side"] / seconds["side_by_side_ending"], 3),
    )
