"""All decoding: sampling from the teacher-student mixture, greedy decoding, and token ids to text.

Student and teacher decode side by side, each with its own key-value cache, or the teacher reads in blocks and draws at
its own positions only (coins.py). Every token is drawn by
`minillm_kernels.mixed_sample`, which returns the log-probs of the law that was sampled. They are kept, and so are the
final hidden states that predicted each token, so that nothing needs a second forward pass over a response: the
teacher's distribution at any position is its head applied to the state kept here. Where the teacher has no part in
the draw (alpha = 0), it does not decode: it reads each response once, in one forward pass.

A step of decoding reads once from the device: which sequences go on. Those that have ended are dropped; where only
`Decoding.chunk_size` are decoded at once, each gives its place to the next prompt. A token is drawn from the uniforms
of its sequence and position, so that it does not depend on what is decoded beside it.

Legend: B sequences, b of them decoded now, T longest response, H hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.model.coins import Mixer, Turns
from minillm.model.decoder import Decoder, left_pad, takes_rows
from minillm.model.head import CausalLM, Scorer, common_vocabulary
from minillm.model.masks import decodes_by_sdpa
from minillm.model.places import Ends, Law, Places, Tokens
from minillm.model.rollout import Rollout, add_teacher, add_teacher_logprobs, in_order
from minillm.model.static import check_graphs, takes_graphs

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
    """Most sequences decoded at once; 0: all. The tokens do not depend on it."""
    graphs: bool | None = None
    """Decode at fixed addresses, on a card by CUDA graphs (see static.py); None: on a card, where the models can. The
    tokens do not depend on it."""

    def __post_init__(self) -> None:
        if self.coins_first and not (self.temperature > 0 and self.top_k == 0 and self.top_p == 1):
            raise ValueError(
                "coins first draws from the softmax of both models: it needs a temperature above 0, no top_k and no "
                f"top_p, and got {self.temperature}, {self.top_k} and {self.top_p}. Sample without coins_first"
            )


@torch.no_grad()  # not inference_mode: the hidden states kept enter a graph later
def sample(
    student: CausalLM,
    teacher: Scorer | None,
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
        decoding: limit, end-of-sequence, temperature, filters and the way of decoding.
        alpha: weight of the teacher in the mixture.
        samples_per_prompt: samples of one prompt are neighbours in the result and share its prefill.
        uniforms: [max_new_tokens, B, 2] float64 make the draw repeatable, token by token, for any pair of models (see
            `draw_uniforms`); None draws from torch's default generator.
        vocab_size: the columns of the heads that count; None takes those that both models have.
        row_length: a teacher that only reads the responses reads several of them in a row of this many tokens, as in
            `collate`.
        student_states: keep `student_hidden`, which training does not need.

    Raises FloatingPointError where logits are not finite.
    """
    copies = samples_per_prompt
    vocab_size = vocab_size or common_vocabulary(student, *([] if teacher is None else [teacher]))
    beside: CausalLM | Mixer | None = None
    if alpha > 0 or decoding.top_k or decoding.top_p < 1:  # else it has no part in the draw, and needs no filter
        if not isinstance(teacher, CausalLM | None) and not (decoding.coins_first and isinstance(teacher, Mixer)):
            raise ValueError("a teacher that is not in this process draws tokens by coins_first alone")
        beside = teacher
    if uniforms is None:
        uniforms = torch.rand(decoding.max_new_tokens, len(prompts) * copies, 2, dtype=torch.float64)
    order, at_once = list(range(len(prompts))), len(prompts)
    if decoding.chunk_size:  # the longest first: what memory does not hold fails at once
        order, at_once = sorted(order, key=lambda i: -len(prompts[i])), max(1, decoding.chunk_size // copies)
    rows: list[int] = []
    parts: list[Rollout] = []
    models = [lm for lm in (student, beside) if isinstance(lm, CausalLM)]
    decoded = models[:1] if decoding.coins_first else models  # the teacher then reads blocks
    if decoding.graphs:
        check_graphs(*decoded)
    graphs = decoding.graphs or (decoding.graphs is None and student.device.type == "cuda")
    graphs = graphs and all(map(takes_graphs, decoded))
    with decodes_by_sdpa(*models):
        in_turn = at_once
        if at_once < len(order) and not decoding.coins_first:  # which is shared by rows that stand at one position
            in_turn = len(order) if graphs or all(map(takes_rows, models)) else at_once
        for start in range(0, len(order), in_turn):
            chosen = order[start : start + in_turn]
            mine = [i * copies + copy for i in chosen for copy in range(copies)]
            part = _Batch([prompts[i] for i in chosen], copies, decoding, alpha, uniforms[:, mine], vocab_size)
            parts.append(part.decode(student, beside, student_states, at_once, graphs))
            rows += mine
    rollout = in_order(parts, rows) if len(parts) > 1 or rows != sorted(rows) else parts[0]
    if teacher is None or beside is not None:
        return rollout
    return add_teacher(rollout, teacher, decoding.temperature or 1.0, vocab_size, row_length)


@dataclass
class _Batch:
    """Prompts that are answered together, `copies` times each, and the law of their answers."""

    prompts: list[Sequence[int]]
    copies: int
    decoding: Decoding
    alpha: float
    uniforms: Tensor
    """[T, B, 2], where they were drawn."""
    vocab_size: int

    def decode(
        self, student: CausalLM, teacher: CausalLM | Mixer | None, student_states: bool, at_once: int, graphs: bool
    ) -> Rollout:
        """The answers of both models, or of the student alone, to `at_once` prompts at a time.

        Rows that have ended make place for the next prompts once these are worth a forward pass. Where none wait,
        they are dropped once they are a quarter of those that are decoded; a half where a graph is made anew.
        """
        decoding, copies, device = self.decoding, self.copies, student.device
        limit, uniforms = decoding.max_new_tokens, self.uniforms.to(device, non_blocking=True)
        prompts = [list(prompt) for prompt in self.prompts for _ in range(copies)]
        lms, turns = [lm for lm in (student, teacher) if isinstance(lm, CausalLM)], None
        if teacher is not None and decoding.coins_first:
            lms, coins = [student], (self.uniforms[..., 0] < self.alpha).T.tolist()
            behind = left_pad(prompts, limit, device)
            turns = Turns(teacher, behind, uniforms, coins, decoding.temperature, self.vocab_size)
        ends = torch.tensor(list(decoding.ends), dtype=torch.long).to(device, non_blocking=True)
        law = Law(self.alpha, decoding.temperature, decoding.top_k, decoding.top_p, self.vocab_size, uniforms, ends)
        tokens, known = Tokens(len(prompts), limit), Ends(len(prompts), limit, device)

        def begin(first: int, last: int) -> Places:
            decoders = [self._read_prompts(lm, first, last) for lm in lms]
            rows = range(first * copies, last * copies)
            places = Places(decoders, law, tokens, known, rows, student_states)
            places.step(turns)
            return places

        begun = min(at_once, len(self.prompts))
        places = begin(0, begun)
        if graphs:
            places.fix(max(map(len, prompts)) + limit)
        while True:
            known.receive()
            going_on, waiting = len(places.going_on()), len(self.prompts) - begun
            joining = min(at_once - -(-going_on // copies), waiting)
            if going_on and joining < min(waiting, _worth_reading(at_once, limit)):
                joining = 0
            if not going_on and not joining:
                break
            held = len(places.held)
            if going_on and (going_on <= held / 2 and not waiting if graphs else joining or going_on <= 0.75 * held):
                places.drop(prompts)
            if going_on:
                places.step(turns)
            if joining:
                more, begun = begin(begun, begun + joining), begun + joining
                if going_on or graphs:
                    places.join(more)
                else:
                    places = more

        known.receive(everything=True)
        fields, hidden = tokens.of(known.lengths)
        rollout = Rollout(
            prompts=prompts,
            **fields,
            student_hidden=hidden.pop(0) if student_states else None,
            teacher_hidden=hidden.pop(0) if hidden else None,
        )
        if turns is not None:
            rollout = rollout._replace(teacher_hidden=turns.finish(known.lengths))
            rollout = add_teacher_logprobs(rollout, turns.teacher, self.alpha, decoding.temperature, self.vocab_size)
        return _read_once(rollout, known.lengths, [student, teacher])

    def _read_prompts(self, lm: CausalLM, first: int, last: int) -> Decoder:
        """A decoder that has read the prompts first … last - 1, and goes on from each `copies` times."""
        padded = left_pad(self.prompts[first:last], self.decoding.max_new_tokens, lm.device)
        decoder = Decoder(lm, padded.exists, padded.any)
        decoder.read(padded.ids)
        if self.copies > 1:
            of_prompt = torch.arange(last - first).repeat_interleave(self.copies)
            decoder.keep(of_prompt.to(lm.device, non_blocking=True))
        return decoder


def _worth_reading(at_once: int, limit: int) -> int:
    """Prompts that are read together, while others decode. n prompts take a forward pass of all weights, in which
    n/2 places have waited for it in the mean over responses of L tokens: 1/n + L/(at_once - n/2) passes a response
    are least near this n."""
    return max(1, math.ceil(at_once * math.sqrt(2 / limit)))


def _read_once(rollout: Rollout, lengths: list[int], models: Sequence[Scorer | None]) -> Rollout:
    """The rollout with its tokens on the host.

    Raises FloatingPointError where a token was drawn from logits that are not finite.
    """
    undrawable = rollout.mixture_logprobs.isnan().any(1)
    found = torch.cat([rollout.token_ids, undrawable[:, None]], dim=1).tolist()
    broken = [i for i, (*_, nothing_drawn) in enumerate(found) if nothing_drawn]
    if broken:
        names = [type(lm.model if isinstance(lm, CausalLM) else lm).__name__ for lm in models if lm is not None]
        raise FloatingPointError(
            f"the logits of {' or '.join(names)} are not finite in response to the prompt with the token ids "
            f"{rollout.prompts[broken[0]][:20]}: nothing can be sampled. Its weights are broken, or its dtype "
            "overflows"
        )
    return rollout._replace(known=[row[:n] for row, n in zip(found, lengths, strict=True)])


def greedy(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, ends: Sequence[int]
) -> list[list[int]]:
    """The most likely token at every step; a response includes its end-of-sequence where it was reached."""
    decoding = Decoding(max_new_tokens, ends, temperature=0.0, chunk_size=batch_size)
    return sample(model, None, prompts, decoding, alpha=0.0, student_states=False).responses() if prompts else []


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
