"""Rollouts whose tokens an engine has drawn: our own models read them once, and say all that is learnt from them.

An engine gives log-probs of its own arithmetic, in 16 bits often, and under tensor parallelism or with quantised
weights yet others. Where the law q_e that it drew from differs from our q, tokens are off-policy by the ratio
q / q_e. `engine_gap` is the mean of |log q - log q_e|; `engine_weights` are the ratios, cut off. By a coin u < α the
tokens of a mixture come from an engine of the teacher, p_e, or of the student, q_e, so with m for the model that drew

    E over u and y ~ m_e of [ m(y) / m_e(y) · f(y) ] = Σ_y (α p(y) + (1-α) q(y)) f(y)

the ratio of the model that drew corrects the mixture, for any f. Cutting it off at a number trades a bias for variance
(truncated importance sampling, as TRL's vllm_importance_sampling_correction).

Legend: B responses, T longest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.config.schema import ConfigError
from minillm.engine.responses import Response
from minillm.model.head import CausalLM, Scorer
from minillm.model.rollout import Rollout, mixture_logprobs, read_responses

WIDEST_GAP = 0.5
"""Nats per token, beyond which an engine does not round: it draws from another law."""


def drawn(responses: Sequence[Response], device: torch.device) -> Rollout:
    """What the engines alone tell of responses: their tokens, and log-probs of the law that each was drawn from."""
    lengths = torch.tensor([len(each.token_ids) for each in responses], dtype=torch.long)
    shape = len(responses), max((len(each.token_ids) for each in responses), default=0)
    token_ids, from_teacher = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape)
    for row, each in enumerate(responses):
        length = len(each.token_ids)
        token_ids[row, :length] = torch.tensor(each.token_ids)
        logprobs[row, :length] = torch.tensor(each.logprobs)
        from_teacher[row, :length] = torch.tensor(each.coins[:length])
    token_ids, lengths, from_teacher, logprobs = (
        tensor.to(device, non_blocking=True) for tensor in (token_ids, lengths, from_teacher, logprobs)
    )
    return Rollout(
        prompts=[list(each.prompt) for each in responses],
        token_ids=token_ids,
        lengths=lengths,
        student_logprobs=logprobs,
        teacher_logprobs=None,
        mixture_logprobs=logprobs,
        from_teacher=from_teacher,
        student_hidden=None,
        teacher_hidden=None,
        known=[each.token_ids for each in responses],
        engine_logprobs=logprobs,
    )


@torch.no_grad()
def read(
    rollout: Rollout,
    student: CausalLM,
    teacher: Scorer | None,
    alpha: float,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    row_length: int = 0,
    student_states: bool = False,
) -> Rollout:
    """The same tokens, with log-probs and states of our own models.

    Args:
        rollout: what `drawn` returns.
        student, teacher: the teacher may be None where alpha is 0.
        alpha: weight of the teacher in the mixture.
        temperature: of the log-probs.
        vocab_size, row_length, student_states: as in `minillm.model.sampling.sample`.

    Raises ConfigError where the engines draw from another law than these models.
    """
    hidden, student_logprobs = read_responses(student, rollout, temperature, vocab_size, row_length)
    teacher_hidden, teacher_logprobs = None, None
    if teacher is not None:
        teacher_hidden, teacher_logprobs = read_responses(teacher, rollout, temperature, vocab_size, row_length)
    mixture = student_logprobs
    if teacher_logprobs is not None:
        mixture = mixture_logprobs(student_logprobs, teacher_logprobs, alpha, rollout.mask)
    found = rollout._replace(
        student_logprobs=student_logprobs,
        teacher_logprobs=teacher_logprobs,
        mixture_logprobs=mixture,
        student_hidden=hidden if student_states else None,
        teacher_hidden=teacher_hidden,
    )
    gap = float(engine_gap(found))
    if not gap <= WIDEST_GAP:
        raise ConfigError(
            f"the engine's log-probs are {gap:.2f} nats per token off those of the model itself: it draws from "
            "another law. A server must hold the same model and run with --logprobs-mode processed_logprobs"
        )
    return found


def engine_gap(rollout: Rollout) -> Tensor:
    """Mean over the tokens of |log q - log q_e|, in nats, of the model that drew each."""
    return _log_ratios(rollout).abs().sum() / rollout.lengths.sum()


def engine_weights(rollout: Rollout, largest: float) -> Tensor:
    """[B, T] min(q / q_e, largest), of the model that drew each token."""
    return _log_ratios(rollout).exp().clamp(max=largest)


def _log_ratios(rollout: Rollout) -> Tensor:
    """[B, T] 0 beyond the ends."""
    assert rollout.engine_logprobs is not None
    own = rollout.student_logprobs if rollout.older_logprobs is None else rollout.older_logprobs
    if rollout.teacher_logprobs is not None:
        own = torch.where(rollout.from_teacher, rollout.teacher_logprobs, own)
    return torch.where(rollout.mask, own - rollout.engine_logprobs, torch.zeros_like(own))
