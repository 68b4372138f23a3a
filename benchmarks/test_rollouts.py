"""Rollouts on the demo pair: places refilled or not, side by side, coins first, against what bounds them.

Responses end after a third of the limit in the mean. Where nothing ends, decoding takes what it took when rows that
had ended were decoded on to the limit.

SmolLM2-135M-Instruct and its cut of 24 layers, as in recipes/smollm2-cpu.yaml (fetched on first use). Everything is
timed in one run, on one thread, by the time of its processor, so that the ratios hold while the machine does
something else. The floor of coins first is the student decoding alone and the
teacher reading the responses once. Forward passes are counted, and the table computes from them what 7B / 1.5B would
take where nothing but the weights' bytes counts. The results, in 10 minutes of one processor:

    pytest benchmarks/test_rollouts.py --benchmark-only --benchmark-json=benchmarks/results/rollouts.json
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from test_training import RECIPE

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.model.coins import share_coins
from minillm.model.decoder import takes_rows
from minillm.model.masks import takes_masks
from minillm.model.rollout import add_teacher
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.train.preflight import prepare

pytestmark = pytest.mark.download
ALPHA = 0.2


class Size(NamedTuple):
    prompts: int
    places: int
    new_tokens: int


TIMED, VERIFIED = Size(64, 16, 64), Size(16, 4, 24)


@pytest.fixture(scope="module")
def size(request) -> Size:
    return VERIFIED if request.config.getoption("benchmark_disable") else TIMED


@pytest.fixture(scope="module")
def context(size):
    recipe = load_recipe(RECIPE, [f"--rollout.max_new_tokens={size.new_tokens}"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
    torch.set_num_threads(threads)


def ends_for(rollout, tokens: float) -> list[int]:
    """Tokens that would end the responses of a rollout after so many tokens, in the mean: the frequent ones,
    but for those that would end them sooner."""
    responses, ends = rollout.responses(), []
    for token, _ in Counter(token for response in responses for token in response).most_common():
        tried = {*ends, token}
        lengths = [next((i + 1 for i, t in enumerate(r) if t in tried), len(r)) for r in responses]
        if sum(lengths) >= tokens * len(responses):
            ends.append(token)
    return ends


def test_rollouts(benchmark, context, size):
    sequences, places, limit = size
    free_of_ends = Decoding(limit, ends=(), chunk_size=places)
    prompts = [example.prompt for example in context.examples[:sequences]]
    in_turn = sorted(range(sequences), key=lambda i: -len(prompts[i]))
    turns = [in_turn[start : start + places] for start in range(0, sequences, places)]
    student, teacher = context.student, context.teacher
    uniforms = share_coins(draw_uniforms(0, limit, sequences), 1)

    def roll(decoding=free_of_ends, teacher=teacher, alpha=ALPHA, rows=in_turn):
        chosen, columns = [prompts[i] for i in rows], context.vocab_size
        return sample(student, teacher, chosen, decoding, alpha=alpha, uniforms=uniforms[:, rows], vocab_size=columns)

    def generate():
        for rows in turns:
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in rows])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            options = {"max_new_tokens": limit, "min_new_tokens": limit, "do_sample": True, "top_k": 0}
            student.model.generate(ids, attention_mask=mask, pad_token_id=0, **options)

    passes: Counter[str] = Counter()
    for name, lm in (("student", student), ("teacher", teacher)):
        assert takes_masks(lm) and takes_rows(lm)  # tried once, which is neither counted nor timed
        lm.model.base_model.register_forward_hook(lambda *_, name=name: passes.update([name]))
    seconds, counted, found = {}, {}, {}

    def ending():
        return replace(free_of_ends, ends=ends_for(found["in_turns_to_the_limit"], limit / 3))

    functions = {
        "in_turns_to_the_limit": roll,  # no row ends, none is dropped: what responses that end took at first
        "in_turns": lambda: [roll(ending(), rows=rows) for rows in turns],
        "refilled": lambda: roll(ending()),
        "coins_first": lambda: roll(replace(free_of_ends, coins_first=True)),
        "student_alone": lambda: roll(teacher=None, alpha=0.0),
        "teacher_reads": lambda: add_teacher(found["student_alone"], teacher, 1.0, context.vocab_size, 0),
        "generate": generate,
    }

    def measure():
        for name, function in functions.items():
            passes.clear()
            start = time.process_time()
            found[name] = function()
            seconds[name], counted[name] = time.process_time() - start, dict(passes)
            print(name, seconds[name], counted[name])

    benchmark.group = "rollouts"
    benchmark.pedantic(measure, rounds=1)
    # verified: few tokens differ, where rounding turns one over and what follows with it; states are the same
    free, refilled = found["in_turns_to_the_limit"], found["refilled"]
    in_turns = [row for part in found["in_turns"] for row in part.responses()]
    for one, other in (
        (refilled.responses(), in_turns),
        (found["coins_first"].responses(), free.responses()),
    ):
        assert sum(a == b for a, b in zip(one, other, strict=True)) >= 0.8 * sequences
    same = (free.token_ids == found["coins_first"].token_ids).all(dim=1)
    torch.testing.assert_close(
        found["coins_first"].teacher_hidden[same], free.teacher_hidden[same], rtol=1e-2, atol=1e-2
    )
    mean = float(refilled.lengths.float().mean())
    assert 0.3 < mean / limit < 0.4
    if benchmark.stats is None:  # --benchmark-disable
        return
    tokens = dict.fromkeys(functions, sequences * limit)
    tokens |= {name: round(sequences * mean) for name in ("in_turns", "refilled")}
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        sequences=sequences,
        places=places,
        new_tokens=limit,
        alpha=ALPHA,
        teacher_turns=int((uniforms[:, 0, 0] < ALPHA).sum()),
        mean_length_ending=round(mean, 1),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        tokens={name: tokens[name] for name in functions},
        forwards=counted,
        refilled_over_limit=round(seconds["in_turns_to_the_limit"] / seconds["refilled"], 3),
        refilled_over_in_turns=round(seconds["in_turns"] / seconds["refilled"], 3),
        coins_first_over_floor=round(
            seconds["coins_first"] / (seconds["student_alone"] + seconds["teacher_reads"]), 3
        ),
        side_by_side_over_coins_first=round(seconds["in_turns_to_the_limit"] / seconds["coins_first"], 3),
    )
