"""Coins first against decoding side by side: the same tokens, states and log-probs, few forwards of the teacher."""

import pytest
import torch

from minillm.model.coins import share_coins
from minillm.model.head import CausalLM
from minillm.model.masks import takes_masks
from minillm.model.sampling import Decoding, draw_uniforms, sample

T = 24
# Lengths 5, 1, 3 and 2: left padding. Ten rows: dropping a quarter of them happens more than once.
PROMPTS = [[5, 9, 17, 33, 2], [7], [100, 3, 45], [8, 8], [1], [2, 3], [9, 9, 9], [4], [6, 6, 6, 6], [10]]


@pytest.fixture
def pair(make_llama):
    """In float64, where one forward of many tokens and many forwards of one round alike."""
    return CausalLM(make_llama(1).double()), CausalLM(make_llama(2, seed=7).double())


def both(pair, alpha, ends=(), groups=1, prompts=PROMPTS, **settings):
    """The rollouts of decoding side by side and of coins first, from the same uniforms."""
    rows = len(prompts) * settings.get("samples_per_prompt", 1)
    uniforms = share_coins(draw_uniforms(0, T, rows), groups)
    return [
        sample(*pair, prompts, Decoding(T, ends, coins_first=first), alpha=alpha, uniforms=uniforms, **settings)
        for first in (False, True)
    ]


def assert_same(expected, found):
    assert found.prompts == expected.prompts and found.responses() == expected.responses()
    for name, value in expected._asdict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                getattr(found, name), value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("groups", [1, 3, len(PROMPTS)])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0])
def test_tokens_states_and_logprobs_are_those_of_decoding_side_by_side(pair, alpha, groups):
    assert_same(*both(pair, alpha, groups=groups))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("every", [8, 40])
def test_responses_that_end_at_different_positions(pair, alpha, every):
    """An eighth of the vocabulary ends a response, or a fortieth: before, at and after the teacher's turns, and rows
    are dropped on the way."""
    for first in range(4):
        expected, found = both(pair, alpha, ends=range(first, 257, every), groups=2)
        assert len(set(expected.lengths.tolist())) > 2
        assert_same(expected, found)


def test_samples_of_one_prompt_and_unequal_heads(make_llama):
    student, teacher = make_llama(1, vocab_size=257), make_llama(2, seed=7, vocab_size=300)
    pair = CausalLM(student.double()), CausalLM(teacher.double())
    assert_same(*both(pair, 0.4, groups=2, samples_per_prompt=3))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_the_teacher_runs_once_for_each_of_its_positions_and_once_at_the_end(pair, alpha):
    calls = []
    assert takes_masks(pair[1])  # tried once, which is not counted
    pair[1].model.base_model.register_forward_hook(lambda *_: calls.append(1))
    uniforms = share_coins(draw_uniforms(3, T, len(PROMPTS)), 1)
    sample(*pair, PROMPTS, Decoding(T, (), coins_first=True), alpha=alpha, uniforms=uniforms)
    turns = uniforms[:, 0, 0] < alpha
    assert len(calls) == int(turns.sum()) + int(not turns[-1])
    assert len(calls) < T


def test_a_row_has_the_coins_of_its_group_in_the_whole_batch():
    """Four sequences of two processes, or of one: the same coins, so that a run does not depend on its processes."""
    uniforms = draw_uniforms(0, 5, 4)
    shared = share_coins(uniforms, 2)
    assert torch.equal(shared[:, 2:, 0], uniforms[:, :2, 0]) and torch.equal(shared[..., 1], uniforms[..., 1])
    assert torch.equal(share_coins(uniforms, 4), uniforms)


def test_filters_and_greedy_decoding_are_refused():
    for settings in ({"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match="coins first draws from the softmax of both models"):
            Decoding(4, (), coins_first=True, **settings)
