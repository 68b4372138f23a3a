"""The objective against closed forms in float64, and its gradient against autograd through plain torch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config.schema import ObjectiveConfig
from minillm.data.examples import PolicyConstants
from minillm.model.rollout import Rollout
from minillm.train.minillm import importance_weights, policy_constants, returns
from minillm_kernels import minillm_loss, token_logprobs


def make_rollout(lengths, width, seed=0, alpha=0.2, vocab=11) -> Rollout:
    """A rollout of random logits; values beyond each length are rubbish that must never count."""
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    student, teacher = torch.randn(2, rows, width, vocab, generator=g, dtype=torch.float64) * 2
    ids = torch.randint(vocab, (rows, width), generator=g)
    q = student.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    p = teacher.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mixture = torch.log(alpha * p.exp() + (1 - alpha) * q.exp())
    lengths = torch.tensor(lengths)
    pad = torch.arange(width) >= lengths[:, None]
    hidden = torch.zeros(rows, width, 1)
    rubbish = [value.masked_fill(pad, 1e9) for value in (q, p, mixture)]
    return Rollout([[1]] * rows, ids, lengths, *rubbish, torch.zeros_like(pad), hidden, hidden)


def summed(student, teacher, token_ids, policy, *, clip_range=0.2, single_step=True):
    """Single + Long as the loop asks for them: sums over the tokens; clip_range 0 leaves the ratio unclipped."""
    return minillm_loss(
        student, teacher, token_ids, **policy._asdict(), normalizer=1.0,
        clip_range=clip_range or math.inf, single_step=float(single_step),
    )  # fmt: skip


def returns_by_loop(rewards, lengths, length_norm, include_current):
    result = torch.zeros_like(rewards)
    for b, length in enumerate(lengths):
        for t in range(length):
            terms = rewards[b, t if include_current else t + 1 : length].tolist()
            if terms:
                result[b, t] = sum(terms) / (len(terms) if length_norm else 1)
    return result


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    extra=st.integers(0, 3),
    length_norm=st.booleans(),
    include_current=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_returns_are_the_means_of_what_follows(lengths, extra, length_norm, include_current, seed):
    width = max(1, *lengths) + extra
    rewards = torch.randn(len(lengths), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = returns(
        rewards.masked_fill(~mask, float("nan")), mask, length_norm=length_norm, include_current=include_current
    )
    torch.testing.assert_close(found, returns_by_loop(rewards, lengths, length_norm, include_current))


def test_returns_of_a_written_out_example():
    rewards = torch.tensor([[3.0, -1.0, 2.0, 4.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert returns(rewards, mask).tolist() == [[5 / 3, 3.0, 4.0, 0.0]]
    assert returns(rewards, mask, length_norm=False).tolist() == [[5.0, 6.0, 4.0, 0.0]]


def test_the_last_token_has_return_exactly_zero_whatever_came_before():
    rewards = torch.tensor([[1e8, 0.1, 0.2]])
    assert returns(rewards, torch.ones(1, 3, dtype=torch.bool))[0, 2] == 0


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
def test_importance_weights_are_student_over_mixture(alpha):
    rollout = make_rollout([4, 2], 4, alpha=alpha)
    q, p = rollout.student_logprobs.exp(), rollout.teacher_logprobs.exp()
    weights = importance_weights(rollout)[rollout.mask]
    torch.testing.assert_close(weights, (q / (alpha * p + (1 - alpha) * q))[rollout.mask])
    assert weights.max() <= 1 / (1 - alpha) + 1e-12


def test_constants_have_the_lengths_of_the_responses_and_ignore_padding():
    rollout = make_rollout([3, 0, 5, 1], 6)
    constants = policy_constants(rollout, ObjectiveConfig())
    assert [len(policy.advantages) for policy in constants] == [3, 0, 5, 1]
    joined = PolicyConstants.concatenate(constants)
    assert all(torch.isfinite(field).all() and field.abs().max() < 1e3 for field in joined)
    torch.testing.assert_close(joined.old_logprobs, rollout.student_logprobs[rollout.mask])


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "clipped"),
    [
        (1.0, 2.0, 2.0, 0),
        (1.5, 2.0, 1.2 * 2.0, 1),  # already more likely and good: no further push
        (1.5, -2.0, 1.5 * -2.0, 0),  # more likely and bad: full push back
        (0.5, 2.0, 0.5 * 2.0, 0),
        (0.5, -2.0, 0.8 * -2.0, 1),
        (1.5, 0.0, 0.0, 0),
    ],
)
def test_clipping_takes_the_pessimistic_branch(ratio, advantage, gain, clipped):
    # two tokens of equal logits: log q(y) = -log 2, so old_logprobs set the ratio; the weight enters it as a factor
    logits = torch.zeros(1, 2, dtype=torch.float64)
    first = torch.tensor([0])
    weight = 0.9
    old = torch.tensor([0.5 * weight / ratio], dtype=torch.float64).log()
    policy = PolicyConstants(
        torch.tensor([advantage], dtype=torch.float64), old, torch.tensor([weight], dtype=torch.float64)
    )
    result = summed(logits, logits, first, policy)
    assert result.policy_loss.item() == pytest.approx(-gain, abs=1e-12)
    assert result.clip_fraction.item() == clipped
    unclipped = summed(logits, logits, first, policy, clip_range=0.0)
    assert unclipped.policy_loss.item() == pytest.approx(-ratio * advantage)


def test_a_single_token_response_learns_from_the_single_step_term_alone():
    (policy,) = policy_constants(make_rollout([1], 3), ObjectiveConfig())
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1, 11, dtype=torch.float64, generator=g)
    result = summed(student, teacher, torch.tensor([4]), policy)
    q = student.softmax(-1)
    kl = (q * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum()
    assert result.policy_loss == 0
    torch.testing.assert_close(result.loss, policy.importance_weights[0] * kl)


def test_no_tokens_at_all_is_a_zero_loss():
    policy = PolicyConstants.concatenate(policy_constants(make_rollout([0, 0], 3), ObjectiveConfig()))
    empty = torch.zeros(0, 11, dtype=torch.float64, requires_grad=True)
    result = summed(empty, empty.detach(), torch.zeros(0, dtype=torch.long), policy)
    assert result.loss == 0


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_of_the_whole_loss_against_plain_torch(clip_range, single_step, weighted):
    rollout = make_rollout([5, 1, 0, 4], 6, seed=1)
    objective = ObjectiveConfig(single_step=single_step, importance_weights=weighted)
    policy = PolicyConstants.concatenate(policy_constants(rollout, objective))
    ids, vocab, count = rollout.token_ids[rollout.mask], 11, int(rollout.lengths.sum())
    g = torch.Generator().manual_seed(2)
    student = torch.randn(count, vocab, dtype=torch.float64, generator=g, requires_grad=True)
    teacher = torch.randn(count, vocab, dtype=torch.float64, generator=g)
    text = torch.randn(7, vocab, dtype=torch.float64, generator=g, requires_grad=True)
    text_ids = torch.randint(vocab, (7,), generator=g)

    result = summed(student, teacher, ids, policy, clip_range=clip_range, single_step=single_step)
    ours = result.loss / count - token_logprobs(text, text_ids).sum() / 7
    found = torch.autograd.grad(ours, (student, text))

    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    ratio = (log_q.gather(-1, ids[:, None])[:, 0] - policy.old_logprobs).exp() * policy.importance_weights
    gain = ratio * policy.advantages
    if clip_range:
        gain = torch.minimum(gain, ratio.clamp(1 - clip_range, 1 + clip_range) * policy.advantages)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    plain = -gain.sum() + (policy.importance_weights * kl).sum() * single_step
    plain = plain / count - text.log_softmax(-1).gather(-1, text_ids[:, None]).sum() / 7
    expected = torch.autograd.grad(plain, (student, text))

    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("single_step", [True, False])
def test_expected_gradient_without_mixing_and_normalisation_is_that_of_the_sequence_kl(single_step):
    """Where the method is exact, it is exact: all 27 sequences of three tokens over a tabular policy, enumerated."""
    vocab, length = 3, 3
    prefixes = [p for n in range(length) for p in itertools.product(range(vocab), repeat=n)]
    g = torch.Generator().manual_seed(5)
    student = torch.randn(len(prefixes), vocab, dtype=torch.float64, generator=g, requires_grad=True)
    teacher = torch.randn(len(prefixes), vocab, dtype=torch.float64, generator=g)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    kl, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for y in itertools.product(range(vocab), repeat=length):
        rows = torch.tensor([prefixes.index(y[:t]) for t in range(length)])
        ids = torch.tensor(y)
        q = log_q[rows, ids]
        kl = kl + q.sum().exp() * (q - log_p[rows, ids]).sum()
        hidden = torch.zeros(1, length, 1)
        rollout = Rollout(
            [[1]],
            ids[None],
            torch.tensor([length]),
            q.detach()[None],
            log_p[rows, ids][None],
            q.detach()[None],  # sampled from the student: the mixture is the student
            torch.zeros(1, length, dtype=torch.bool),
            hidden,
            hidden,
        )
        (policy,) = policy_constants(rollout, ObjectiveConfig(length_norm=False, single_step=single_step))
        loss = summed(student[rows], teacher[rows], ids, policy, clip_range=0.0, single_step=single_step).loss
        surrogate = surrogate + q.detach().sum().exp() * loss
    torch.testing.assert_close(torch.autograd.grad(surrogate, student), torch.autograd.grad(kl, student))
