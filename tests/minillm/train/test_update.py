"""One whole update of each variant, by hand: float64, a tiny pair, a fixed rollout, plain torch.

The hand knows the formulas of minillm/train/minillm.py and nothing of the package: log-probabilities come from
the models' own logits over whole sequences, returns from loops over tokens, the optimiser is torch's plain AdamW.
"""

import copy
import dataclasses

import pytest
import torch

from minillm.config.recipe import stage_from
from minillm.config.schema import RunConfig, StageConfig
from minillm.model.head import CausalLM
from minillm.train import loop
from minillm.train.context import Context
from minillm.train.loop import METHODS

PROMPTS = [[5, 9, 17, 33], [7, 8], [100, 3, 45], [60]]
TEXT = [[4, 8, 15, 16, 23], [42, 7, 7, 9, 1], [11, 12, 13, 14, 15], [2, 4, 6, 8, 10]]
ALPHA, CLIP, LR = 0.2, 0.2, 1e-2
ABLATIONS = ("single_step", "importance_weights", "weight_single_step", "length_norm")


def build(files, make_llama, tokenizer, **objective) -> tuple[Context, StageConfig]:
    from accelerate import Accelerator

    from minillm.data.examples import Example, Record

    config = stage_from(
        {
            "method": "minillm",
            "rollout": {"batch_size": 4, "max_new_tokens": 7, "epochs": 2, "alpha": ALPHA},
            "objective": {"pt_batch_size": 2, "pt_length": 5, **objective},
            "optim": {"batch_size": 2, "micro_batch_size": 1, "lr": LR, "max_grad_norm": 0.7, "steps": 3},
            "validation": {"every": 0},
        }
    )
    student, teacher = (CausalLM(make_llama(layers, seed=layers).double()) for layers in (2, 3))
    teacher.requires_grad_(False)
    examples = [Example(Record([], None), prompt, []) for prompt in PROMPTS]
    return Context(RunConfig(), config, Accelerator(), student, teacher, tokenizer, examples, [], TEXT), config


def logits_of(model, prompt, response):
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def kl(a, b):
    """KL(a ‖ b) per row of logits."""
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)


def hand(student, teacher, old, minibatch, texts, o):
    """The loss of one minibatch of (prompt, response), per token."""
    rows = []
    for prompt, response in minibatch:
        ids, length = torch.tensor(response)[:, None], len(response)
        with torch.no_grad():
            p = logits_of(teacher, prompt, response).log_softmax(-1).gather(1, ids)[:, 0]
            q = logits_of(old, prompt, response).log_softmax(-1).gather(1, ids)[:, 0]
        mixture = torch.log(ALPHA * p.exp() + (1 - ALPHA) * q.exp())
        r = (p - q) / o.reward_scaling
        if o.reward_clip:
            r = r.clamp(-o.reward_clip, o.reward_clip)
        current = o.include_current or not o.single_step
        returns = []
        for t in range(length):
            first = t if current else t + 1
            value = sum(o.discount ** (k - first) * r[k].item() for k in range(first, length))
            returns.append(value / max(1, length - first) if o.length_norm else value)
        w = (q - mixture).exp() if o.importance_weights else torch.ones_like(q)
        rows.append((prompt, response, ids, q, w, torch.tensor(returns, dtype=torch.float64)))
    every = torch.cat([returns for *_, returns in rows])
    tokens, total = len(every), 0.0
    for prompt, response, ids, q, w, advantage in rows:
        if o.whiten:
            advantage = (advantage - every.mean()) / (every.var(correction=0) + 1e-8).sqrt()
        z = logits_of(student, prompt, response)
        ratio = (z.log_softmax(-1).gather(1, ids)[:, 0] - q).exp() * w
        bounded = ratio.clamp(1 - CLIP, 1 + CLIP) if o.clip_range else ratio
        total = total - torch.minimum(ratio * advantage, bounded * advantage).sum()
        single = kl(z, logits_of(teacher, prompt, response).detach())
        total = total + (o.single_step * (w if o.weight_single_step else 1.0) * single).sum()
    total = total / tokens
    for text in texts if o.pt_weight else []:
        z, ids = logits_of(student, text[:1], text[1:]), torch.tensor(text[1:])
        lm = torch.nn.functional.cross_entropy(z, ids, reduction="sum")
        p = logits_of(teacher, text[:1], text[1:]).detach().softmax(-1)
        soft = -(p * z.log_softmax(-1)).sum() + (p * p.log()).sum()  # less the teacher's entropy, a constant
        count = sum(len(text) - 1 for text in texts)
        total = total + o.pt_weight * ((1 - o.pt_teacher) * lm + o.pt_teacher * soft) / count
    return total


@pytest.mark.parametrize(
    "objective",
    [
        {"variant": "paper"},
        {"variant": "reference"},
        *({"variant": "paper", name: False} for name in ABLATIONS),
        {"variant": "reference", "single_step": False},
        {"variant": "reference", "whiten": False, "reward_clip": 0.5},
        {"variant": "paper", "clip_range": 0.0, "pt_teacher": 1.0},
        {"variant": "paper", "pt_weight": 0.0, "discount": 0.5},
    ],
    ids=str,
)
def test_three_updates_by_hand(tmp_path, make_llama, tokenizer, objective):
    """Three, because the first has ratio = w everywhere: then the clip acts, and the third is in the second pass."""
    context, config = build(tmp_path, make_llama, tokenizer, **objective)
    old = copy.deepcopy(context.student.model)
    by_hand = copy.deepcopy(old)
    method = METHODS["minillm"](context, tmp_path)
    ours = torch.optim.AdamW(context.student.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=1e-6)
    theirs = torch.optim.AdamW(by_hand.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=1e-6)
    clipped = 0.0
    for number in (1, 2, 3):
        parts, _ = method.step(number)
        sampled = list(zip(method.rollout.prompts, method.rollout.responses(), strict=True))
        minibatch = [(example.prompt, example.response) for example in parts[0].examples]
        assert all(pair in sampled for pair in minibatch)
        texts = [example.prompt + example.response for example in parts[1].examples] if len(parts) > 1 else []
        assert all(text in TEXT for text in texts)
        micros = [loop.Micro(part, part.batch([example])) for part in parts for example in part.examples]
        metrics = loop.backward(context, context.student, micros)
        clipped += metrics["clip_fraction"]
        loss = hand(by_hand, context.teacher.model, old, minibatch, texts, config.objective)
        loss.backward()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)  # metrics are float32
        for optimizer, model in ((ours, context.student), (theirs, by_hand)):
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for (name, a), b in zip(context.student.model.named_parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert any((a != b).any() for a, b in zip(old.parameters(), by_hand.parameters(), strict=True))
    assert (clipped > 0) == bool(config.objective.clip_range)  # the case is hard enough to show the clip


def test_what_the_reference_variant_changes():
    paper, reference = (stage_from({"objective": {"variant": v}}).objective for v in ("paper", "reference"))
    differing = {k for k, v in dataclasses.asdict(paper).items() if getattr(reference, k) != v} - {"variant"}
    assert differing == {
        "weight_single_step", "include_current", "discount", "reward_scaling", "reward_clip", "whiten", "pt_teacher",
    }  # fmt: skip
    assert stage_from({"objective": {"variant": "reference", "discount": 1.0}}).objective.discount == 1.0
