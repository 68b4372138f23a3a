"""What needs no vLLM: who draws which token, laws, and what is learnt from them."""

import dataclasses
import gc
import sys

import pytest
import torch
from vllm_service import QUICK, answers

from minillm.config.schema import ConfigError, ObjectiveConfig
from minillm.engine import Answer, law_of, pair
from minillm.engine.pair import ENGINES, Draw, draw, engine_of
from minillm.engine.responses import Voice, responses_to, write
from minillm.engine.rollout import drawn, engine_gap, engine_weights, read
from minillm.model.head import CausalLM
from minillm.model.sampling import Decoding, draw_uniforms
from minillm.train.minillm import policy_constants


class Recorder:
    """An engine that answers number i of a request with tokens of its own, and keeps what it was asked."""

    def __init__(self, token, at_once=1):
        self.token, self.at_once, self.asked, self.begun = token, at_once, [], []

    def submit(self, number, request, law):
        self.asked.append((number, list(request.prompt), request.max_tokens, request.seed))
        self.begun.append((number, Answer([self.token] * request.max_tokens, [-1.0] * request.max_tokens)))

    def finished(self):
        now, self.begun = self.begun[: self.at_once], self.begun[self.at_once :]
        return now


def test_the_student_writes_up_to_the_next_turn_of_the_teacher():
    coins = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    uniforms = torch.stack([1 - coins.T.double() * 0.9, torch.arange(15).view(5, 3) / 2**53], dim=2)
    uniforms[..., 0].clamp_(max=0.99)
    responses = responses_to([[7], [8, 9], [5]], (), 0.5, uniforms)
    student, teacher = Recorder(1), Recorder(2)
    write(responses, Voice(student, {}), Voice(teacher, {}))
    assert [each.token_ids for each in responses] == [[1, 1, 2, 1, 2], [2, 2, 1, 1, 1], [1] * 5]
    assert sorted(student.asked) == [
        (0, [7], 2, 0),
        (0, [7, 1, 1, 2], 1, 9),
        (1, [8, 9, 2, 2], 3, 7),
        (2, [5], 5, 2),
    ]
    assert sorted(teacher.asked) == [
        (0, [7, 1, 1], 1, 6),
        (0, [7, 1, 1, 2, 1], 1, 12),
        (1, [8, 9], 1, 1),
        (1, [8, 9, 2], 1, 4),
    ]


def test_nothing_is_asked_after_an_end():
    responses = responses_to([[7], [8]], (2,), 1.0, torch.full((6, 2, 2), 0.5))
    student, teacher = Recorder(1), Recorder(2)
    write(responses, Voice(student, {}), Voice(teacher, {}))
    assert [each.token_ids for each in responses] == [[2], [2]] and not student.asked and len(teacher.asked) == 2


def test_columns_that_do_not_count_are_ruled_out():
    law = law_of(Decoding(4, (3, 9), temperature=0.5, top_k=7, top_p=0.9), 250, 252)
    assert law["logit_bias"] == {250: -100.0, 251: -100.0} and law["stop_token_ids"] == [3, 9]
    assert (law["temperature"], law["top_k"], law["top_p"], law["ignore_eos"]) == (0.5, 7, 0.9, True)
    assert law_of(Decoding(4, ()), 250, 250)["logit_bias"] is None


def test_without_vllm_an_engine_in_this_process_is_refused(student, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"needs vLLM.*pip install vllm.*engine.url"):
        engine_of(student, QUICK)


def test_an_engine_does_not_keep_its_model(serve, make_llama):
    lm = CausalLM(make_llama(2))
    answers(lm, serve(lm))
    before = len(ENGINES)
    del lm
    gc.collect()
    assert len(ENGINES) < before


def test_the_gap_and_the_correction_are_of_the_model_that_drew(serve, student, teacher):
    config = dataclasses.replace(QUICK, url=serve(student).url, teacher_url=serve(teacher).url)
    engines = engine_of(student, config), engine_of(teacher, config)
    how = Draw(student, teacher, 0.4, Decoding(8, ()), 257)
    rollout = drawn(draw(how, engines, [[5], [6], [7], [8]], draw_uniforms(0, 8, 4)), student.device)
    found = read(rollout, student, teacher, 0.4, student_states=True)
    assert float(engine_gap(found)) < 1e-5 and 0 < int(found.from_teacher.sum()) < 32
    mixture = torch.log(0.4 * found.teacher_logprobs.exp() + 0.6 * found.student_logprobs.exp())
    torch.testing.assert_close(found.mixture_logprobs, mixture, rtol=1e-4, atol=1e-5)
    for states, lm, logprobs in (
        (found.student_hidden, student, found.student_logprobs),
        (found.teacher_hidden, teacher, found.teacher_logprobs),
    ):
        law = lm.logits(states).log_softmax(-1)
        torch.testing.assert_close(law.gather(2, rollout.token_ids[..., None])[..., 0], logprobs)

    off = found._replace(engine_logprobs=found.engine_logprobs - torch.tensor([0.0, 0.1, 1.0, -0.2])[:, None])
    assert float(engine_gap(off)) == pytest.approx(1.3 / 4, abs=1e-4)
    expected = torch.tensor([1.0, 1.1052, 2.0, 0.8187])[:, None].expand(4, 8)
    torch.testing.assert_close(engine_weights(off, 2.0), expected, rtol=1e-3, atol=1e-3)
    objective = ObjectiveConfig()
    for plain, corrected, weight in zip(
        policy_constants(off, objective), policy_constants(off, objective, 2.0), expected, strict=True
    ):
        torch.testing.assert_close(corrected.importance_weights, plain.importance_weights * weight, rtol=1e-3, atol=0)
        torch.testing.assert_close(corrected.advantages, plain.advantages)


def test_the_correction_makes_an_estimate_under_another_law_exact():
    """Σ_m P(m) Σ_y m_e(y) · m(y) / m_e(y) · f(y) is the mean of f under the mixture, for any engine's laws."""
    torch.manual_seed(0)
    q, p, q_engine, p_engine = torch.randn(4, 50, dtype=torch.float64).softmax(-1)
    f, alpha = torch.randn(50, dtype=torch.float64), 0.3
    estimate = alpha * (p_engine * (p / p_engine) * f).sum() + (1 - alpha) * (q_engine * (q / q_engine) * f).sum()
    torch.testing.assert_close(estimate, ((alpha * p + (1 - alpha) * q) * f).sum())


def test_an_engine_of_another_law_is_refused(serve, teacher, make_llama):
    service = serve(CausalLM(make_llama(3, seed=7)))
    with pytest.raises(ConfigError, match=r"nats per token off .*another law.*processed_logprobs"):
        read(drawn(answers(teacher, service), teacher.device), teacher, None, 0.0)


def test_several_processes_need_a_server(student, monkeypatch):
    monkeypatch.setattr(pair, "PartialState", lambda: dataclasses.make_dataclass("S", [("num_processes", int, 2)])())
    with pytest.raises(ConfigError, match=r"run of 2 processes.*engine.url"):
        engine_of(student, QUICK)
