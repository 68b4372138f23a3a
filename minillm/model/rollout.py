"""What a rollout is, and what the models say of one that exists.

Legend: B sequences, T longest response, H hidden.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, distributed

from minillm.data.examples import collate
from minillm.model.head import CausalLM, Scorer
from minillm_kernels import fused_linear_token_logprobs
from minillm_kernels.parallel.collectives import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Rollout(NamedTuple):
    """Responses and all that was known when they were sampled; entries beyond a response's length are 0."""

    prompts: list[list[int]]
    """B prompts, one per sequence."""
    token_ids: Tensor
    """[B, T] sampled tokens; the last one is end-of-sequence unless the limit was reached."""
    lengths: Tensor
    """[B] tokens sampled, end-of-sequence included."""
    student_logprobs: Tensor
    """[B, T] log q(y_t) of the student that sampled, in nats."""
    teacher_logprobs: Tensor | None
    """[B, T] log p(y_t); None without a teacher."""
    mixture_logprobs: Tensor
    """[B, T] log-probs of the mixture, the law sampled from."""
    from_teacher: Tensor
    """[B, T] bool, whether the teacher's side of the mixture drew the token."""
    student_hidden: Tensor | None
    """[B, T, H] student's final states, each predicting the token of its position; None where not asked for."""
    teacher_hidden: Tensor | None
    """[B, T, H] teacher's, likewise."""
    decoded_logprobs: Tensor | None = None
    """[B, T] log q(y_t) as decoding gave them, where `rescore` has replaced them."""
    engine_logprobs: Tensor | None = None
    """[B, T] of each token under the model that drew it, as the engine gave them; None where no engine drew."""
    older_logprobs: Tensor | None = None
    """[B, T] log q(y_t) of the older student that sampled, where `renewed` has replaced them."""
    known: list[list[int]] | None = None
    """What `responses` returns, where it has been read from the device."""

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, tokens that exist."""
        return torch.arange(self.token_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def responses(self) -> list[list[int]]:
        """The sampled tokens of each sequence, to its end."""
        if self.known is not None:
            return self.known
        return [row[:n] for *row, n in torch.cat([self.token_ids, self.lengths[:, None]], dim=1).tolist()]


def add_teacher(
    rollout: Rollout, teacher: Scorer, temperature: float, vocab_size: int | None, row_length: int
) -> Rollout:
    """Add the teacher's log-probs and states to responses that it had no part in."""
    hidden, logprobs = read_responses(teacher, rollout, temperature, vocab_size, row_length)
    return rollout._replace(teacher_hidden=hidden, teacher_logprobs=logprobs)


def add_teacher_logprobs(
    rollout: Rollout, teacher: Scorer, alpha: float, temperature: float, vocab_size: int | None
) -> Rollout:
    """Add the log-probs of the teacher, whose states are known, and of the mixture."""
    states, mask = rollout.teacher_hidden, rollout.mask
    assert states is not None
    targets = rollout.token_ids.masked_fill(~mask, -100)  # which are not read
    logprobs = fused_linear_token_logprobs(
        states.flatten(0, 1), teacher.head, targets.flatten(), temperature=temperature, vocab_size=vocab_size
    ).view(mask.shape)
    mixture = mixture_logprobs(rollout.student_logprobs, logprobs, alpha, mask)
    return rollout._replace(teacher_logprobs=logprobs, mixture_logprobs=mixture)


@torch.no_grad()
def rescore(
    rollout: Rollout,
    student: CausalLM,
    teacher: Scorer,
    alpha: float,
    vocab_size: int | None,
    row_length: int,
) -> Rollout:
    """The same responses with the log-probs and states of whole forward passes, as an update makes them, instead of
    those of decoding with a cache: in 16 bits the two differ by more than a clipped ratio may. At temperature 1,
    unfiltered.
    """
    _, student_logprobs = read_responses(student, rollout, 1.0, vocab_size, row_length)
    teacher_hidden, teacher_logprobs = rollout.teacher_hidden, rollout.teacher_logprobs
    if alpha > 0:  # else the teacher's are of such a pass already
        teacher_hidden, teacher_logprobs = read_responses(teacher, rollout, 1.0, vocab_size, row_length)
    assert teacher_logprobs is not None
    return rollout._replace(
        student_logprobs=student_logprobs,
        teacher_logprobs=teacher_logprobs,
        mixture_logprobs=mixture_logprobs(student_logprobs, teacher_logprobs, alpha, rollout.mask),
        teacher_hidden=teacher_hidden,
        decoded_logprobs=rollout.student_logprobs,
    )


@torch.no_grad()
def renewed(rollout: Rollout, student: CausalLM, vocab_size: int | None, row_length: int) -> Rollout:
    """The same responses with the log-probs of a student that has learnt since they were sampled. The law that sampled
    stays: `mixture_logprobs`."""
    _, logprobs = read_responses(student, rollout, 1.0, vocab_size, row_length)
    return rollout._replace(student_logprobs=logprobs, older_logprobs=rollout.student_logprobs)


def share_of(rollout: Rollout, process: int, processes: int) -> Rollout:
    """The rows that a process has of what `gather_processes` put together."""
    fields: list[Any] = [value[process::processes] if value is not None else None for value in rollout]
    return Rollout(*fields)


def read_responses(
    lm: Scorer, rollout: Rollout, temperature: float, vocab_size: int | None, row_length: int
) -> tuple[Tensor, Tensor]:
    """[B, T, H] final states and [B, T] log-probs of the responses, read by a model; 0 beyond their ends."""
    hidden, logprobs = [], []
    responses, at_once = rollout.responses(), 16  # sequences of a forward pass
    for start in range(0, len(responses), at_once):
        rows = slice(start, start + at_once)
        batch = collate(rollout.prompts[rows], responses[rows], row_length).to(lm.device)
        output = lm.output(batch)
        hidden.append(output.states)
        logprobs.append(
            fused_linear_token_logprobs(*output, batch.targets, temperature=temperature, vocab_size=vocab_size)
        )
    states, known, shape = torch.cat(hidden), torch.cat(logprobs), rollout.token_ids.shape
    places = [row * shape[1] + t for row, response in enumerate(responses) for t in range(len(response))]
    tokens = torch.tensor(places, dtype=torch.long).to(lm.device, non_blocking=True)
    all_states = states.new_zeros(shape.numel(), states.shape[1]).index_copy_(0, tokens, states)
    all_logprobs = torch.zeros_like(rollout.student_logprobs).flatten()
    all_logprobs.index_copy_(0, tokens, known.to(all_logprobs.dtype))
    return all_states.unflatten(0, shape), all_logprobs.view(shape)


def mixture_logprobs(student: Tensor, teacher: Tensor, alpha: float, mask: Tensor) -> Tensor:
    """log(α p + (1-α) q) of log-probs; 0 outside the mask."""
    if alpha in (0, 1):
        return teacher if alpha else student
    mixed = torch.logaddexp(teacher + math.log(alpha), student + math.log1p(-alpha))
    return torch.where(mask, mixed, torch.zeros_like(mixed))


def in_order(parts: Sequence[Rollout], rows: Sequence[int]) -> Rollout:
    """One rollout of several; row i of their concatenation becomes row rows[i]."""
    back = torch.tensor(rows, device=parts[0].lengths.device).argsort()
    longest = max(part.token_ids.shape[1] for part in parts)

    def joined(values: Sequence[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], list):
            flat = [prompt for prompts in values for prompt in prompts]
            return [flat[i] for i in back.tolist()]
        if values[0].dim() > 1:
            values = [F.pad(v, (0, 0) * (v.dim() - 2) + (0, longest - v.shape[1])) for v in values]
        return torch.cat(list(values))[back]

    return Rollout(*map(joined, zip(*parts, strict=True)))


def gather_processes(rollout: Rollout, group: "ProcessGroup | None" = None) -> Rollout:
    """The responses of all processes, or of those of a group, known to each: row i of process r becomes row
    i · processes + r."""
    processes = distributed.get_world_size(group) if PartialState().num_processes > 1 else 1
    if processes == 1:
        return rollout
    everyone: list[Any] = [None] * processes
    told = list(zip(rollout.prompts, rollout.responses(), strict=True)), rollout.token_ids.shape[1]
    distributed.all_gather_object(everyone, told, group=group)
    shares, widths = zip(*everyone, strict=True)

    def interleave(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if values.dim() > 1:
            values = F.pad(values, (0, 0) * (values.dim() - 2) + (0, max(widths) - values.shape[1]))
        return gather(values, group).transpose(0, 1).flatten(0, 1)

    prompts, known = zip(*(pair for row in zip(*shares, strict=True) for pair in row), strict=True)
    tensors: dict[str, Any] = {
        name: interleave(value) for name, value in rollout._asdict().items() if name not in ("prompts", "known")
    }
    return Rollout(prompts=list(prompts), known=list(known), **tensors)
