"""All decoding: sampling from the teacher-student mixture, greedy decoding, and token ids to text.

Student and teacher decode side by side, each with its own key-value cache. Every token is drawn by
`minillm_kernels.mixed_sample`, which returns the log-probs of the law that was sampled. They are kept, and so are the
final hidden states that predicted each token, so that nothing needs a second forward pass over a response: the
teacher's distribution at any position is its head applied to the state kept here. Where the teacher has no part in
the draw (alpha = 0), it does not decode: it reads each response once, in one forward pass.

A step of decoding reads one number from the device: whether any sequence goes on.

Legend: B sequences, P longest prompt, T longest response, H hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from minillm.data.examples import collate
from minillm.model.head import CausalLM, common_vocabulary
from minillm.model.masks import decodes_by_sdpa, of_padded
from minillm_kernels import MixedSample, fused_linear_token_logprobs, mixed_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How a response is drawn, token by token, and where it ends."""

    max_new_tokens: int
    """Longest response, in tokens."""
    ends: Sequence[int]
    """Tokens that end a response, each a part of it (see `minillm.model.load.end_tokens`)."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens of each model; 0: all."""
    top_p: float = 1.0
    """Then keep this probability mass of each model; 1: all."""


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


@torch.no_grad()  # not inference_mode: the hidden states kept enter a graph later
def sample(
    student: CausalLM,
    teacher: CausalLM | None,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    alpha: float = 0.2,
    samples_per_prompt: int = 1,
    uniforms: Tensor | None = None,
    vocab_size: int | None = None,
    row_length: int = 0,
    student_states: bool = True,
) -> Rollout:
    """Continue each prompt with tokens drawn from α p + (1-α) q, until end-of-sequence or the limit of tokens.

    Args:
        student, teacher: q and p; the teacher may be None where alpha is 0.
        prompts: token ids, none of them empty.
        decoding: limit, end-of-sequence, temperature and filters.
        alpha: weight of the teacher in the mixture.
        samples_per_prompt: samples of one prompt are neighbours in the result and share its prefill.
        uniforms: [max_new_tokens, B, 2] float64 make the draw repeatable, token by token, for any pair of models (see
            `draw_uniforms`); None draws from torch's default generator.
        vocab_size: the columns of the heads that count; None takes those that both models have.
        row_length: a teacher that only reads the responses reads several of them in a row of this many tokens, as in
            `collate`.
        student_states: keep `student_hidden`, which training does not need.
    """
    device = student.device
    if vocab_size is None:
        vocab_size = common_vocabulary(*(lm for lm in (student, teacher) if lm is not None))
    beside = teacher
    if alpha == 0 and decoding.top_k == 0 and decoding.top_p == 1:
        beside = None  # it has no part in the draw, and its law of a token needs no filter
    models = [lm for lm in (student, beside) if lm is not None]
    sampled_prompts = [list(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
    ends = torch.tensor(list(decoding.ends), dtype=torch.long).to(device, non_blocking=True)
    running = torch.ones(len(sampled_prompts), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(sampled_prompts), dtype=torch.long, device=device)
    if uniforms is not None:
        uniforms = uniforms.to(device, non_blocking=True)  # all at once
    steps, hidden = [], []
    with decodes_by_sdpa(*models):
        padded = _left_pad(prompts, decoding.max_new_tokens, device)
        decoders = [_Decoder(lm, padded, samples_per_prompt) for lm in models]
        for t in range(decoding.max_new_tokens):
            logits = [decoder.logits() for decoder in decoders]
            hidden.append([decoder.hidden for decoder in decoders if decoder.model is not student or student_states])
            drawn = mixed_sample(
                logits[0],
                logits[1] if beside is not None else None,
                alpha,
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
                uniforms=None if uniforms is None else uniforms[t],
                vocab_size=vocab_size,
            )
            steps.append(drawn)
            lengths += running
            running = running & (drawn.token_ids[:, None] != ends).all(1)
            if t + 1 == decoding.max_new_tokens or not running.any():
                break
            for decoder in decoders:
                decoder.append(drawn.token_ids)
    states = [torch.stack(states, dim=1) for states in zip(*hidden, strict=True)]
    rollout = Rollout(
        prompts=sampled_prompts,
        lengths=lengths,
        **_stack_steps(steps, lengths),
        student_hidden=states[0] if student_states else None,
        teacher_hidden=states[-1] if beside is not None else None,
    )
    undrawable = rollout.mixture_logprobs.isnan().any(1)
    found = torch.cat([rollout.token_ids, lengths[:, None], undrawable[:, None]], dim=1).tolist()  # read once
    rollout = rollout._replace(known=[row[:n] for *row, n, _ in found])
    broken = [i for i, (*_, nothing_drawn) in enumerate(found) if nothing_drawn]
    if broken:
        raise FloatingPointError(
            f"the logits of {' or '.join(type(lm.model).__name__ for lm in models)} are not finite in response to "
            f"the prompt with the token ids {sampled_prompts[broken[0]][:20]}: nothing can be "
            "sampled. Its weights are broken, or its dtype overflows"
        )
    if teacher is None or beside is not None:
        return rollout
    return _score_rollout(rollout, teacher, decoding.temperature or 1.0, vocab_size, row_length)


def _stack_steps(steps: Sequence[MixedSample], lengths: Tensor) -> dict[str, Any]:
    """[B, T] of each field that the steps have, 0 beyond the end of a response."""
    beyond = torch.arange(len(steps), device=lengths.device) >= lengths[:, None]
    columns = zip(*steps, strict=True)
    return {
        name: None if column[0] is None else torch.stack(column, dim=1).masked_fill(beyond, 0)
        for name, column in zip(MixedSample._fields, columns, strict=True)
    }


def _score_rollout(
    rollout: Rollout, teacher: CausalLM, temperature: float, vocab_size: int | None, row_length: int
) -> Rollout:
    """Add the teacher's log-probs and states to responses that it had no part in."""
    hidden, logprobs = _read_responses(teacher, rollout, temperature, vocab_size, row_length)
    return rollout._replace(teacher_hidden=hidden, teacher_logprobs=logprobs)


@torch.no_grad()
def rescore(
    rollout: Rollout,
    student: CausalLM,
    teacher: CausalLM,
    alpha: float,
    vocab_size: int | None,
    row_length: int,
) -> Rollout:
    """The same responses with the log-probs and states of whole forward passes, as an update makes them, instead of
    those of decoding with a cache: in 16 bits the two differ by more than a clipped ratio may. At temperature 1,
    unfiltered.
    """
    _, student_logprobs = _read_responses(student, rollout, 1.0, vocab_size, row_length)
    teacher_hidden, teacher_logprobs = rollout.teacher_hidden, rollout.teacher_logprobs
    mixture = student_logprobs
    if alpha > 0:  # else the teacher's are of such a pass already
        teacher_hidden, teacher_logprobs = _read_responses(teacher, rollout, 1.0, vocab_size, row_length)
        mixture = torch.logaddexp(teacher_logprobs + math.log(alpha), student_logprobs + math.log1p(-alpha))
    return rollout._replace(
        student_logprobs=student_logprobs,
        teacher_logprobs=teacher_logprobs,
        mixture_logprobs=torch.where(rollout.mask, mixture, torch.zeros_like(mixture)),
        teacher_hidden=teacher_hidden,
        decoded_logprobs=rollout.student_logprobs,
    )


def _read_responses(
    lm: CausalLM, rollout: Rollout, temperature: float, vocab_size: int | None, row_length: int
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


def greedy(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, ends: Sequence[int]
) -> list[list[int]]:
    """The most likely token at every step; a response includes its end-of-sequence where it was reached."""
    decoding = Decoding(max_new_tokens, ends, temperature=0.0)
    responses: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        responses += sample(model, None, part, decoding, alpha=0.0, student_states=False).responses()
    return responses


def greedy_responses(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    ends: Sequence[int],
) -> list[str]:
    """The text of greedy responses."""
    return decode(tokenizer, greedy(model, prompts, max_new_tokens, batch_size, ends))


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: list[list[int]]) -> list[str]:
    """Responses as text, without special tokens and outer white space."""
    return [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]


def gather_processes(rollout: Rollout, accelerator: Accelerator) -> Rollout:
    """The responses of all processes, known to each: row i of process r becomes row i · processes + r."""
    if accelerator.num_processes == 1:
        return rollout

    def interleave(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if values.dim() > 1:
            values = accelerator.pad_across_processes(values, dim=1)
        everyone = accelerator.gather(values.contiguous())
        return everyone.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1).contiguous()

    shares = gather_object([list(zip(rollout.prompts, rollout.responses(), strict=True))])
    prompts, known = zip(*(pair for row in zip(*shares, strict=True) for pair in row), strict=True)
    tensors: dict[str, Any] = {
        name: interleave(value) for name, value in rollout._asdict().items() if name not in ("prompts", "known")
    }
    return Rollout(prompts=list(prompts), known=list(known), **tensors)


def draw_uniforms(seed: int, max_new_tokens: int, sequences: int) -> Tensor:
    """Uniforms [max_new_tokens, sequences, 2] that depend on the seed and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(max_new_tokens, sequences, 2, dtype=torch.float64, generator=generator)


class _Padded(NamedTuple):
    """Prompts behind padding."""

    ids: Tensor
    """[B, P]"""
    exists: Tensor
    """[B, P + new tokens] bool, what is no padding."""
    any: bool
    """Whether there is padding."""


class _Decoder:
    """One model with its cache, and the final hidden state [B, H] of its last token."""

    def __init__(self, model: CausalLM, prompts: _Padded, copies: int) -> None:
        from transformers import DynamicCache

        self.model, self.padded, self.length = model, prompts.any, prompts.ids.shape[1]
        self.cache = DynamicCache(config=model.model.config)
        exists = prompts.exists[:, : self.length]
        hidden = model.states(
            prompts.ids,
            of_padded(model, exists, self.length, self.padded),
            self.cache,
            position_ids=(exists.cumsum(dim=1) - 1).clamp(min=0),
        )
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
        self.hidden = hidden[:, -1].repeat_interleave(copies, dim=0)
        self.exists = prompts.exists.repeat_interleave(copies, dim=0)
        self.position = exists.sum(dim=1, keepdim=True).repeat_interleave(copies, dim=0)  # of the next token

    def logits(self) -> Tensor:
        return self.model.logits(self.hidden)

    def append(self, token_ids: Tensor) -> None:
        """Feed one token per sequence. Sequences that have ended go on decoding; what follows is never read."""
        self.length += 1
        masks = of_padded(self.model, self.exists[:, : self.length], 1, self.padded)
        self.hidden = self.model.states(token_ids[:, None], masks, self.cache, position_ids=self.position)[:, -1]
        self.position = self.position + 1


def _left_pad(prompts: Sequence[Sequence[int]], new_tokens: int, device: torch.device) -> _Padded:
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    exists = torch.arange(longest + new_tokens) >= longest - torch.tensor(lengths)[:, None]
    ids, exists = (tensor.to(device, non_blocking=True) for tensor in (ids, exists))
    return _Padded(ids, exists, min(lengths) < longest)
