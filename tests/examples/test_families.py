"""Model families: MiniLLM's objective on hidden states and heads trains what it trains on the models' own logits.

For each family and both variants of the objective: three optimiser steps on one rollout, by
`fused_linear_minillm_loss`, by `minillm_loss` on the model's logits, and by the formulas written out in PyTorch. And
what the trainer does to models beside: cached decoding of prompts padded on the left, packed rows, cutting a student.
"""

import copy
import dataclasses

import pytest
import torch
from families import FAMILIES, V, hidden, logits, pair, rollout

from minillm.config.schema import ConfigError
from minillm.model.check import check_packing
from minillm.model.head import CausalLM, read_head
from minillm.model.layers import drop_layers
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm_kernels import Head, fused_linear_minillm_loss, fused_linear_token_logprobs, minillm_loss

VARIANTS = ("paper", "reference")
HAS = {"bias": ("phi",), "softcap": ("gemma2", "gemma3"), "scale": ("cohere", "granite")}


def fused(student, teacher, sampled):
    with torch.no_grad():
        teacher_hidden = hidden(teacher, sampled)
    models = (hidden(student, sampled), read_head(student), teacher_hidden, read_head(teacher).detach())
    return fused_linear_minillm_loss(*models, sampled.counted, chunk_rows=7, **sampled.constants).loss


def from_logits(student, teacher, sampled):
    with torch.no_grad():
        teacher_logits = logits(teacher, sampled)
    own = logits(student, sampled)
    return minillm_loss(own, teacher_logits, sampled.counted, **sampled.constants).loss


def written_out(student, teacher, sampled):
    log_q, log_p = logits(student, sampled).log_softmax(-1), logits(teacher, sampled).detach().log_softmax(-1)
    old, w, advantage, weighted = sampled.constants.values()
    ratio = (log_q.gather(-1, sampled.tokens[..., None]).squeeze(-1) - old).exp() * w
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    single = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (policy + (w * single if weighted else single))[sampled.mask].mean()


def three_steps(loss_of, student, teacher, sampled):
    """AdamW in fp64, where a gradient of rounding errors is far below its eps; in fp32, SGD does not amplify it."""
    student = copy.deepcopy(student)
    adam = student.dtype == torch.float64
    optimizer = (
        torch.optim.AdamW(student.parameters(), lr=3e-3) if adam else torch.optim.SGD(student.parameters(), 0.1)
    )
    losses = []
    for _ in range(3):
        loss = loss_of(student, teacher, sampled)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, student


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps(family, variant, dtype, tolerance):
    student, teacher = pair(family, dtype)
    sampled = rollout(student, teacher, variant)
    wanted, expected = three_steps(written_out, student, teacher, sampled)
    moved = max((x - y).abs().max() for x, y in zip(expected.parameters(), student.parameters(), strict=True))
    assert moved > 1e-3  # so that the tolerance means something
    for loss_of in (fused, from_logits):
        losses, trained = three_steps(loss_of, student, teacher, sampled)
        assert losses == pytest.approx(wanted, rel=tolerance, abs=tolerance)
        for (name, x), y in zip(trained.named_parameters(), expected.parameters(), strict=True):
            assert (x - y).abs().max() <= tolerance, f"{loss_of.__name__}: {name} {(x - y).abs().max():.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_give_the_models_own_logits(family):
    student, teacher = pair(family)
    sampled = rollout(student, teacher, "paper")
    CausalLM(student), CausalLM(teacher)  # neither is refused
    for model in (student, teacher):
        head = read_head(model)
        own = logits(model, sampled).log_softmax(-1).gather(-1, sampled.tokens[..., None]).squeeze(-1)
        found = fused_linear_token_logprobs(hidden(model, sampled), head, sampled.tokens)
        assert (found - own).abs().max() <= 2e-6
        # each step that the family has is felt: without it the log-probabilities are others
        for name, absent in {"bias": None, "softcap": None, "scale": 1.0}.items():
            if family not in HAS[name]:
                continue
            without = dataclasses.replace(head, **{name: absent})
            found = fused_linear_token_logprobs(hidden(model, sampled), without, sampled.tokens)
            assert (found - own).abs().max() > 1e-2, name


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_know_the_log_probabilities_of_a_full_forward_pass(family):
    """The longest prompt and its answer are twice the window of the Gemmas; the shortest is almost all padding."""
    prompts = [[*range(5, 16)], [7], [100, 3, 45]]
    pair_of = [CausalLM(model) for model in pair(family)]
    rollout = sample(*pair_of, prompts, Decoding(6, ends=()), uniforms=draw_uniforms(0, 6, 3), vocab_size=V)
    for lm, kept in zip(pair_of, (rollout.student_logprobs, rollout.teacher_logprobs), strict=True):
        for prompt, response, found in zip(prompts, rollout.responses(), kept, strict=True):
            own = lm.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = own.gather(-1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_right_or_refused_and_students_are_cut(family):
    _, teacher = pair(family)
    if family == "opt":  # counts positions from a mask, whatever it is told
        with pytest.raises(ConfigError, match="does not keep packed sequences apart"):
            check_packing(teacher)
    else:
        check_packing(teacher)
    assert CausalLM(drop_layers(teacher, 0, 1)).model.config.num_hidden_layers == 1


def test_families_have_what_they_stand_for():
    heads: dict[str, Head] = {family: read_head(pair(family)[0]) for family in FAMILIES}
    assert heads["gemma2"].softcap == heads["gemma3"].softcap == 2.5
    assert heads["cohere"].scale == heads["granite"].scale == 0.25
    assert heads["phi"].bias is not None
    assert heads["opt"].weight.shape == (V, 16)  # OPT projects to the size of its embedding


def test_the_clip_acts():
    student, teacher = pair("llama")
    sampled = rollout(student, teacher, "reference")
    _, trained = three_steps(fused, student, teacher, sampled)
    with torch.no_grad():
        own, theirs = logits(trained, sampled), logits(teacher, sampled)
    result = minillm_loss(own, theirs, sampled.counted, **sampled.constants)
    assert 0 < result.clip_fraction < 1
