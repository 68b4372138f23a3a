"""The sequences that are decoded now, and what the host knows of them: what a token takes, whoever reads it.

A step reads the last token of each sequence, draws the next one, and keeps what is known of it at the sequence's row
and position. It works in place on tensors that stay, and waits for nothing, so that a CUDA graph can hold it
(static.py). The host learns which sequences have ended a few tokens late: meanwhile they are decoded beyond their end,
where nothing counts.

Legend: B sequences, b of them decoded now, T longest response, H hidden, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.model.coins import Turns
from minillm.model.decoder import Decoder
from minillm.model.static import Replayed, StaticDecoder
from minillm_kernels import MixedSample, mixed_sample

LATE = {"cuda": 4}
"""Tokens after which the host looks which sequences have ended, by the type of device: by then it is known there."""


class Law(NamedTuple):
    """What every token is drawn from, and what ends a response."""

    alpha: float
    temperature: float
    top_k: int
    top_p: float
    vocab_size: int
    uniforms: Tensor
    """[T, B, 2] float64, on the device."""
    ends: Tensor
    """[E] token ids."""

    def draw(self, logits: Sequence[Tensor], rows: Tensor, times: Tensor) -> MixedSample:
        """The tokens [b] at the positions `times` [b] of these rows, from logits [b, V] of each model."""
        return mixed_sample(
            logits[0],
            logits[1] if len(logits) == 2 else None,
            self.alpha if len(logits) == 2 else 0.0,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            uniforms=self.uniforms[times.clamp(max=len(self.uniforms) - 1), rows],
            vocab_size=self.vocab_size,
        )


class Tokens:
    """All that is known of the tokens of B sequences of at most T tokens; column T takes what is drawn beyond them."""

    def __init__(self, sequences: int, limit: int) -> None:
        self.shape = sequences, limit + 1
        self.columns: list[Any] = []
        """Of each field of MixedSample, [B, T + 1], then [B, T + 1, H] of each model whose states are kept."""

    def put(self, rows: Tensor, times: Tensor, drawn: MixedSample, states: list[Tensor]) -> None:
        """What was drawn for these rows [b] at their positions [b]."""
        values: list[Tensor | None] = [*drawn, *states]
        if not self.columns:
            self.columns = [
                None if value is None else value.new_zeros(*self.shape, *value.shape[1:]) for value in values
            ]
        times = times.clamp(max=self.shape[1] - 1)
        for column, value in zip(self.columns, values, strict=True):
            if column is not None:
                column[rows, times] = value

    def of(self, lengths: list[int]) -> tuple[dict[str, Any], list[Tensor]]:
        """The lengths and [B, longest] of each field, and the states [B, longest, H]; 0 beyond a response's end."""
        width, count = max(lengths), len(MixedSample._fields)
        ends = torch.tensor(lengths).to(self.columns[0].device, non_blocking=True)
        beyond = torch.arange(width, device=ends.device) >= ends[:, None]
        found: list[Any] = [
            None if x is None else x[:, :width].masked_fill(beyond.view(*beyond.shape, *[1] * (x.dim() - 2)), 0)
            for x in self.columns
        ]
        fields = dict(zip(MixedSample._fields, found[:count], strict=True))
        return {"lengths": ends, **fields}, found[count:]


class Ends:
    """What the host knows of B sequences: how many tokens were drawn and, a few tokens late, which have ended."""

    def __init__(self, sequences: int, limit: int, device: torch.device) -> None:
        self.limit, self.late = limit, LATE.get(device.type, 0)
        self.drawn = [0] * sequences
        self.lengths = [limit] * sequences
        """Of the responses, where they are known to have ended."""
        self.over: set[int] = set()
        self.sent: deque[tuple[list[int], list[int], Tensor, torch.cuda.Event | None]] = deque()

    def goes_on(self, row: int) -> bool:
        return row not in self.over and self.drawn[row] < self.limit

    def send(self, rows: list[int], running: Tensor) -> None:
        """One more token of each row was drawn; `running` [b], on the device: those that it did not end."""
        for row in rows:
            self.drawn[row] = min(self.drawn[row] + 1, self.limit)
        if any(map(self.goes_on, rows)):
            flags = running.to("cpu", non_blocking=True, copy=True)
            event = torch.cuda.Event() if running.is_cuda else None
            if event is not None:
                event.record()
            self.sent.append((list(rows), [self.drawn[row] for row in rows], flags, event))

    def receive(self, everything: bool = False) -> None:
        """Wait for the flags of `late` tokens ago, or for all: the one wait for the device."""
        while len(self.sent) > (0 if everything else self.late):
            rows, drawn, flags, event = self.sent.popleft()
            if event is not None:
                event.synchronize()
            for row, count, goes_on in zip(rows, drawn, flags.tolist(), strict=True):
                if not goes_on and row not in self.over:
                    self.over.add(row)
                    self.lengths[row] = count


class Places:
    """Sequences whose prompts have been read, by one decoder or two, and that are decoded in step."""

    def __init__(
        self, decoders: Sequence[Decoder], law: Law, tokens: Tokens, ends: Ends, rows: range, student_states: bool
    ) -> None:
        """rows: of the batch. Their first tokens are drawn at the first `step`."""
        self.decoders: list[Decoder | StaticDecoder] = list(decoders)
        self.law, self.tokens, self.ends = law, tokens, ends
        self.first_kept = 0 if student_states else 1
        """The decoder from which on states are kept."""
        self.held = list(rows)
        """The rows, on the host; one that has ended is held until it is dropped or another takes its place."""
        self.rows = torch.arange(rows.start, rows.stop, device=law.uniforms.device)
        self.times, self.token_ids = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.running = torch.ones_like(self.rows, dtype=torch.bool)
        self.reads = False
        """Whether tokens were drawn, which are read before the next ones are."""
        self.graphs: tuple[Replayed, Replayed] | None = None

    def going_on(self) -> list[int]:
        """The rows that have not ended, as far as the host knows."""
        return [row for row in self.held if self.ends.goes_on(row)]

    def step(self, turns: Turns | None = None) -> None:
        """One more token of each sequence. `turns`: the teacher's part, of rows that all stand at one position."""
        advance = self._advance if self.reads else self._draw
        advance() if self.graphs is None else self.graphs[0](advance)
        self.reads = True
        if turns is not None:
            going_on = self.going_on()
            theirs = turns.draw(self.ends.drawn[going_on[0]], self.rows, self.logits[0], self.drawn, going_on)
            for mine, value in zip(self.drawn, theirs or (), strict=False):
                if mine is not None and value is not None:
                    mine.copy_(value)
        self._settle() if self.graphs is None else self.graphs[1](self._settle)
        self.ends.send(self.held, self.running)

    def fix(self, room: int) -> None:
        """From now on read and write at fixed addresses, with room for so many tokens of a sequence, and on a card
        replay a step instead of launching what it is made of."""
        self.decoders = [StaticDecoder(decoder, room) for decoder in self.decoders if isinstance(decoder, Decoder)]
        self._replay()

    def drop(self, prompts: Sequence[Sequence[int]]) -> None:
        """Go on without the sequences that have ended; `prompts` of all rows."""
        kept = [i for i, row in enumerate(self.held) if self.ends.goes_on(row)]
        at = torch.tensor(kept, dtype=torch.long).to(self.rows.device, non_blocking=True)
        self.held = [self.held[i] for i in kept]
        self.rows, self.times, self.token_ids = self.rows[at], self.times[at], self.token_ids[at]
        self.running = self.running[at]
        longest = max(len(prompts[row]) + self.ends.drawn[row] - 1 for row in self.held)
        for decoder in self.decoders:
            decoder.keep(at, longest)
        if self.graphs is not None:
            self._replay()

    def join(self, other: "Places") -> None:
        """Go on with these sequences as well, which have drawn their first tokens; `other` is used up."""
        mine, theirs = ((each.rows, each.times, each.token_ids, each.running) for each in (self, other))
        if self.graphs is not None:
            free = [i for i, row in enumerate(self.held) if not self.ends.goes_on(row)][: len(other.held)]
            at = torch.tensor(free, dtype=torch.long).to(self.rows.device, non_blocking=True)
            for i, row in zip(free, other.held, strict=True):
                self.held[i] = row
            for old, new in zip(mine, theirs, strict=True):
                old[at] = new
            for decoder, more in zip(self.decoders, other.decoders, strict=True):
                assert isinstance(decoder, StaticDecoder) and isinstance(more, Decoder)
                decoder.join(more, at)
        else:
            self.held += other.held
            both = (torch.cat(pair) for pair in zip(mine, theirs, strict=True))
            self.rows, self.times, self.token_ids, self.running = both
            for decoder, more in zip(self.decoders, other.decoders, strict=True):
                assert isinstance(decoder, Decoder) and isinstance(more, Decoder)
                decoder.join(more)

    def _replay(self) -> None:
        self.graphs = Replayed(self.rows.device), Replayed(self.rows.device)

    def _advance(self) -> None:
        for decoder in self.decoders:
            decoder.read(self.token_ids[:, None])
        self._draw()

    def _draw(self) -> None:
        self.logits = [decoder.logits() for decoder in self.decoders]
        self.drawn = self.law.draw(self.logits, self.rows, self.times)

    def _settle(self) -> None:
        """In place: a graph finds the tensors where they were."""
        states = [decoder.state for decoder in self.decoders[self.first_kept :]]
        self.tokens.put(self.rows, self.times, self.drawn, states)
        self.token_ids.copy_(self.drawn.token_ids)
        self.running.logical_and_((self.token_ids[:, None] != self.law.ends).all(1))
        self.times.add_(1)
