"""All decoding: sampling from the teacher-student mixture, greedy decoding, and token ids to text.

Student and teacher decode side by side, each with its own key-value cache, or the teacher reads in blocks and draws at
its own positions only (coins.py). Every token is drawn by
`minillm_kernels.mixed_sample`, which returns the log-probs of the law that was sampled. They are kept, and so are the
final hidden states that predicted each token, so that nothing needs a second forward pass over a response: the
teacher's distribution at any position is its head applied to the state kept here. Where the teacher has no part in
the draw (alpha = 0), it does not decode: it reads each response once, in one forward pass.

Legend: B sequences, P longest prompt, T longest response, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.model.coins import Turns
from minillm.model.decoder import Decoder, left_pad
from minillm.model.head import CausalLM, common_vocabulary
from minillm.model.rollout import Rollout, add_teacher, add_teacher_logprobs, in_order
from minillm_kernels import MixedSample, mixed_sample

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
    coins_first: bool = False
    """Run the teacher at its own positions only (see coins.py); temperature above 0, no filter."""
    chunk_size: int = 0
    """Sequences decoded together; 0: all. The tokens do not depend on it."""

    def __post_init__(self) -> None:
        if self.coins_first and not (self.temperature > 0 and self.top_k == 0 and self.top_p == 1):
            raise ValueError(
                "coins first draws from the softmax of both models: it needs a temperature above 0, no top_k and no "
                f"top_p, and got {self.temperature}, {self.top_k} and {self.top_p}. Sample without coins_first"
            )


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
) -> Rollout:
    """Continue each prompt with tokens drawn from α p + (1-α) q, until end-of-sequence or the limit of tokens.

    Args:
        student, teacher: q and p; the teacher may be None where alpha is 0.
        prompts: token ids, none of them empty.
        decoding: limit, end-of-sequence, temperature, filters and the way of decoding.
        alpha: weight of the teacher in the mixture.
        samples_per_prompt: samples of one prompt are neighbours in the result and share its prefill.
        uniforms: [max_new_tokens, B, 2] float64 make the draw repeatable, token by token, for any pair of models (see
            `draw_uniforms`); None draws from torch's default generator.
        vocab_size: the columns of the heads that count; None takes those that both models have.
        row_length: a teacher that only reads the responses reads several of them in a row of this many tokens, as in
            `collate`.

    Raises FloatingPointError where logits are not finite.
    """
    device, copies = student.device, samples_per_prompt
    if teacher is not None and vocab_size is None:
        vocab_size = common_vocabulary(student, teacher)
    beside = teacher
    if alpha == 0 and decoding.top_k == 0 and decoding.top_p == 1:
        beside = None  # it has no part in the draw, and its law of a token needs no filter
    if uniforms is None:
        uniforms = torch.rand(decoding.max_new_tokens, len(prompts) * copies, 2, dtype=torch.float64)
    order, at_once = list(range(len(prompts))), len(prompts)
    if decoding.chunk_size:  # neighbours in length, so that little is padding
        order, at_once = sorted(order, key=lambda i: len(prompts[i])), max(1, decoding.chunk_size // copies)
    rows, parts = [], []
    for start in range(0, len(order), at_once):
        chosen = order[start : start + at_once]
        rows += [i * copies + copy for i in chosen for copy in range(copies)]
        mine = uniforms[:, rows[len(rows) - len(chosen) * copies :]].to(device)
        parts.append(_decode(student, beside, [prompts[i] for i in chosen], decoding, alpha, copies, mine, vocab_size))
    rollout = in_order(parts, rows) if len(parts) > 1 else parts[0]
    undrawable = rollout.mixture_logprobs.isnan().any(1)
    if undrawable.any():
        models = [lm for lm in (student, beside) if lm is not None]
        raise FloatingPointError(
            f"the logits of {' or '.join(type(lm.model).__name__ for lm in models)} are not finite in response to "
            f"the prompt with the token ids {rollout.prompts[int(undrawable.int().argmax())][:20]}: nothing can be "
            "sampled. Its weights are broken, or its dtype overflows"
        )
    if teacher is None or beside is not None:
        return rollout
    return add_teacher(rollout, teacher, decoding.temperature or 1.0, vocab_size, row_length)


def _decode(
    student: CausalLM,
    teacher: CausalLM | None,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    alpha: float,
    copies: int,
    uniforms: Tensor,
    vocab_size: int | None,
) -> Rollout:
    """Responses to some prompts, decoded together; the teacher takes part where there is one.

    Rows that have ended are dropped once they are a quarter of those that are decoded.
    """
    ids, mask = left_pad(prompts, student.device)
    sampled_prompts = [list(prompt) for prompt in prompts for _ in range(copies)]
    turns = None
    if teacher is not None and decoding.coins_first:
        repeated, shown = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        turns = Turns(teacher, repeated, shown, uniforms, alpha, decoding.temperature, vocab_size)
    decoders = [Decoder(lm) for lm in (student, teacher if turns is None else None) if lm is not None]
    for decoder in decoders:
        decoder.read(ids, mask)
        if copies > 1:
            decoder.keep(torch.arange(len(prompts), device=ids.device).repeat_interleave(copies))

    ends = torch.tensor(list(decoding.ends), dtype=torch.long, device=ids.device)
    rows = torch.arange(len(sampled_prompts), device=ids.device)
    places, padding = rows.tolist(), 0  # `rows` on the host, and the columns of padding that were dropped
    running, lengths = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    alive, steps = running.tolist(), []
    for t in range(decoding.max_new_tokens):
        logits = [decoder.logits() for decoder in decoders]
        states = [decoder.state for decoder in decoders]
        drawn = mixed_sample(
            logits[0],
            logits[1] if len(logits) == 2 else None,
            alpha if len(logits) == 2 else 0.0,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            uniforms=uniforms[t, rows],
            vocab_size=vocab_size,
        )
        if turns is not None:
            drawn = turns.draw(t, rows, logits[0], drawn, {p for p, on in zip(places, alive, strict=True) if on})
        steps.append((rows, drawn, states))
        lengths[rows] += running
        token_ids, running = drawn.token_ids, running & ~torch.isin(drawn.token_ids, ends)
        alive = running.tolist()  # the one wait for the device
        if t + 1 == decoding.max_new_tokens or not any(alive):
            break
        if sum(alive) <= 0.75 * len(alive):
            kept = torch.tensor([i for i, on in enumerate(alive) if on], device=ids.device)
            places = [place for place, on in zip(places, alive, strict=True) if on]
            alive = [True] * len(places)
            spare = ids.shape[1] - max(len(sampled_prompts[place]) for place in places)
            for decoder in decoders:
                decoder.keep(kept, spare - padding)
            rows, running, token_ids, padding = rows[kept], running[kept], token_ids[kept], spare
        for decoder in decoders:
            decoder.read(token_ids[:, None])

    fields, kept_states = _over_rows(steps, lengths)
    rollout = Rollout(
        prompts=sampled_prompts,
        lengths=lengths,
        **fields,
        student_hidden=kept_states[0],
        teacher_hidden=kept_states[1] if len(kept_states) == 2 else None,
    )
    if turns is None:
        return rollout
    rollout = rollout._replace(teacher_hidden=turns.finish(lengths))
    return add_teacher_logprobs(rollout, turns.teacher, alpha, decoding.temperature, vocab_size)


def _over_rows(
    steps: Sequence[tuple[Tensor, MixedSample, list[Tensor]]], lengths: Tensor
) -> tuple[dict, list[Tensor]]:
    """[B, T] of each field that the steps of (rows, what they drew, [b, H] states) have, and [B, T, H] states of each
    model; 0 beyond the end of a response."""
    beyond = torch.arange(len(steps), device=lengths.device) >= lengths[:, None]

    def over_rows(columns: Sequence[Tensor]) -> Tensor:
        values = columns[0].new_zeros(*beyond.shape, *columns[0].shape[1:])
        for t, ((rows, _, _), column) in enumerate(zip(steps, columns, strict=True)):
            values[rows, t] = column
        return values.masked_fill_(beyond.reshape(*beyond.shape, *[1] * (values.dim() - 2)), 0)

    fields = {
        name: None if column[0] is None else over_rows(column)
        for name, column in zip(MixedSample._fields, zip(*(drawn for _, drawn, _ in steps), strict=True), strict=True)
    }
    return fields, [over_rows(column) for column in zip(*(states for _, _, states in steps), strict=True)]


def greedy(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, ends: Sequence[int]
) -> list[list[int]]:
    """The most likely token at every step; a response includes its end-of-sequence where it was reached."""
    decoding = Decoding(max_new_tokens, ends, temperature=0.0)
    responses: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        responses += sample(model, None, prompts[start : start + batch_size], decoding, alpha=0.0).responses()
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


def draw_uniforms(seed: int, max_new_tokens: int, sequences: int) -> Tensor:
    """Uniforms [max_new_tokens, sequences, 2] that depend on the seed and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(max_new_tokens, sequences, 2, dtype=torch.float64, generator=generator)
