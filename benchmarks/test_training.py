"""The trainer on the demo pair: rollouts, an optimiser step from rollouts that exist, and a whole on-policy step.

SmolLM2-135M-Instruct and its cut of 24 layers, as in recipes/smollm2-cpu.yaml (fetched on first use). A rollout runs
both models a token: what it may cost is measured beside it, in turns, as what each model takes to decode alone. The
whole step stands beside the one of TRL's MiniLLMTrainer, which TRL 1.16 no longer has: it runs where 1.14.2 is first
on the path,

    pip install --no-deps --target build/trl trl==1.14.2
    PYTHONPATH=build/trl pytest benchmarks/test_training.py --benchmark-only \\
        --benchmark-json=benchmarks/results/training.json
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.distill import load_pair
from minillm.methods import METHODS
from minillm.objective import concatenate, policy_terms
from minillm.recipe import load_recipe
from minillm.rollout import draw_uniforms, sample
from minillm.train import Micro, backward, chunks, prepare

pytestmark = pytest.mark.download
RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-cpu.yaml"
PROMPTS, NEW_TOKENS, ROUNDS, STEPS = 16, 16, 2, 3
NO_END = -1  # every sequence runs its full length: the same number of tokens whoever decodes


@pytest.fixture(scope="module")
def training():
    config = load_recipe(
        RECIPE, [f"--rollout.max_new_tokens={NEW_TOKENS}", "--rollout.epochs=1", "--rollout.batch_size=8"]
    ).stages["minillm"]
    return prepare(config, *load_pair(config))


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each, in turns: seconds long, every one of them is hit by whatever else the machine does."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def verify(found: dict[str, float], method, parts) -> None:
    """The policy that sampled (learning rate 0) has ratios w: its loss is the mean of -min(w R, clip(w) R)."""
    terms = policy_terms(method.rollout, method.training.config.objective)
    chosen = concatenate([terms[i] for i in parts[0].rows])
    w, gain = chosen.importance_weights, chosen.advantages
    expected = -torch.minimum(w * gain, w.clamp(0.8, 1.2) * gain).mean()
    assert found["loss/policy"] == pytest.approx(float(expected), rel=1e-2, abs=1e-3)


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
    benchmark.pedantic(step, rounds=2)
    verify(found, method, parts)
    tokens = sum(int(micro.batch.attention_mask.sum()) for micro in micros)
    benchmark.extra_info.update(tokens=tokens, threads=torch.get_num_threads())
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median, 1)


def test_whole_step_of_minillm(benchmark, training):
    """Roll out 8 prompts by 16 tokens, both models decoding; score, update; no text, as TRL has none."""
    config = dataclasses.replace(
        training.config, objective=dataclasses.replace(training.config.objective, pt_weight=0.0)
    )
    endless = SimpleNamespace(eos_token_id=NO_END)
    method = METHODS["minillm"](dataclasses.replace(training, config=config, tokenizer=endless), Path())
    optimizer = torch.optim.AdamW(training.student.parameters(), lr=0.0, fused=True)
    size, steps = config.optim.micro_batch_size, iter(range(1, 100))

    def step():
        parts, _ = method.step(next(steps))
        micros = [Micro(part, rows, *part.make(rows)) for part in parts for rows in chunks(part.rows, size)]
        found = backward(training.student, micros, training.accelerator)
        optimizer.step()
        optimizer.zero_grad()
        verify(found, method, parts)
        assert method.rollout.lengths.tolist() == [NEW_TOKENS] * config.optim.batch_size

    step()
    benchmark.group = "one on-policy step"
    benchmark.pedantic(step, rounds=STEPS)
    benchmark.extra_info.update(implementation="minillm", sequences=config.optim.batch_size, new_tokens=NEW_TOKENS)


def test_whole_step_of_trl(benchmark, training, tmp_path):
    """The same prompts, lengths and model by MiniLLMTrainer; its student alone decodes, its teacher scores."""
    trl = pytest.importorskip("trl.experimental.minillm", reason="needs trl==1.14.2, see the top of this file")
    import trl as package
    from datasets import Dataset
    from transformers import TrainerCallback

    batch, seconds = training.config.optim.batch_size, []
    prompts = [training.tokenizer.decode(example.prompt) for example in training.examples]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    trainer = trl.MiniLLMTrainer(
        copy.deepcopy(training.student.model),
        training.teacher.model,
        args=trl.MiniLLMConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            num_generations=1,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            gradient_checkpointing=False,
            learning_rate=0.0,
            max_steps=1 + STEPS,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=training.tokenizer,
        callbacks=[Clock()],
    )
    benchmark.group = "one on-policy step"
    benchmark.pedantic(trainer.train, rounds=1)
    assert len(seconds) == 1 + STEPS
    assert trainer.state.log_history[0]["completions/mean_length"] == NEW_TOKENS
    benchmark.extra_info.update(implementation=f"trl {package.__version__}", sequences=batch, new_tokens=NEW_TOKENS)
    benchmark.extra_info["step_seconds"] = [round(value, 3) for value in seconds[1:]]
