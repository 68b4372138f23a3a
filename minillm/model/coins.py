"""Coins first: exact teacher-mixed sampling that runs the teacher at a share α of the positions.

To draw from α p + (1-α) q, a coin u₀ < α picks the model, then the token comes from that model alone. The coin does
not depend on the text, so all coins of a response are known before its first token. The student decodes alone up to
the next position that is the teacher's; there the teacher reads what was written since its last turn, in one forward
pass of many tokens, and draws one token. Its states at every position come out of these passes, as they do when it
decodes beside the student, token by token.

The passes are shared by rows that have the same coins, a group: α T + 1 forward passes a group, instead of T. Rows of
one group still have the exact law each. What they share is the part of the estimate's variance that comes from the
coins: it is not averaged over the rows of a group. With a coin of its own for each row, some row of a batch needs the
teacher at nearly every position, and nothing would be gained.

Legend: B rows, b rows of a group, g positions read at once, T positions, P longest prompt, H hidden, V vocabulary.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from minillm.model.decoder import Decoder, Padded
from minillm.model.head import CausalLM, Scorer
from minillm_kernels import MixedSample, mixed_sample, token_logprobs


def share_coins(uniforms: Tensor, groups: int) -> Tensor:
    """The same uniforms [T, B, 2], but for the coins [..., 0] of row i, which become those of row i mod `groups`."""
    shared = uniforms.clone()
    shared[..., 0] = uniforms[:, torch.arange(uniforms.shape[1]) % groups, 0]
    return shared


class ReadsOn(Protocol):
    """What reads tokens behind those before, as a Decoder does."""

    def read(self, ids: Tensor) -> Tensor:
        """[b, g, H] the states after each of the tokens `ids` [b, g]."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows."""

    def logits(self) -> Tensor:
        """[b, V] of the token that comes next."""


@runtime_checkable
class Mixer(Scorer, Protocol):
    """A teacher that is not in this process and can take its turns."""

    def decoder(self, exists: Tensor, padded: bool) -> ReadsOn:
        """Of rows as in Padded."""


class Block(NamedTuple):
    """States [b, g, H] of the positions first … first + g - 1 of some rows, each predicting the token there."""

    rows: Tensor
    first: int
    states: Tensor


class Group:
    """The teacher of rows that share their coins."""

    def __init__(self, teacher: CausalLM | Mixer, prompts: Padded, places: list[int], coins: list[bool]) -> None:
        self.places, self.coins = places, coins
        """Rows of the batch that are still read, and whether a position is the teacher's."""
        self.rows = torch.tensor(places).to(prompts.ids.device, non_blocking=True)
        self.prompts = prompts.ids[self.rows]
        rows = prompts.exists[self.rows], prompts.any
        self.decoder: ReadsOn = Decoder(teacher, *rows) if isinstance(teacher, CausalLM) else teacher.decoder(*rows)
        self.known = 0
        """Positions whose states are known."""

    def read(self, token_ids: Tensor, position: int) -> Block:
        """Read up to the state that predicts the token at `position`; token_ids [B, T] were drawn so far."""
        new = token_ids[self.rows, max(self.known - 1, 0) : position]
        if self.known == 0:
            states = self.decoder.read(torch.cat([self.prompts, new], dim=1))[:, self.prompts.shape[1] - 1 :]
        else:
            states = self.decoder.read(new)
        block = Block(self.rows, self.known, states)
        self.known = position + 1
        return block

    def keep(self, running: set[int]) -> None:
        """Read the rows that have not ended from now on, once they are few enough for that to pay."""
        kept = [i for i, place in enumerate(self.places) if place in running]
        if kept and len(kept) <= 0.75 * len(self.places):
            rows = torch.tensor(kept).to(self.rows.device, non_blocking=True)
            self.decoder.keep(rows)
            self.rows, self.places = self.rows[rows], [self.places[i] for i in kept]


class Turns:
    """The teacher's part in decoding a batch."""

    def __init__(
        self,
        teacher: CausalLM | Mixer,
        prompts: Padded,
        uniforms: Tensor,
        coins: list[list[bool]],
        temperature: float,
        vocab_size: int,
    ) -> None:
        """uniforms: [T, B, 2], the second of which draws a token. coins: B times T, whether a position is the
        teacher's."""
        self.teacher, self.uniforms = teacher, uniforms
        self.temperature, self.vocab_size = temperature, vocab_size
        alike: dict[tuple[bool, ...], list[int]] = {}
        for place, row in enumerate(coins):
            alike.setdefault(tuple(row), []).append(place)
        self.groups = [Group(teacher, prompts, places, list(row)) for row, places in alike.items()]
        self.token_ids = prompts.ids.new_zeros(len(coins), len(uniforms))
        self.from_teacher = torch.tensor(coins).to(prompts.ids.device, non_blocking=True)
        self.blocks: list[Block] = []

    def draw(
        self, position: int, rows: Tensor, student_logits: Tensor, drawn: MixedSample, running: list[int]
    ) -> MixedSample | None:
        """What the student drew for these rows, [b], but at the teacher's positions what the teacher draws; None where
        no row that runs stands at one.

        running: the rows that have not ended.
        """
        self.token_ids[rows, position] = drawn.token_ids
        going_on = set(running)
        due = [group for group in self.groups if group.coins[position] and not going_on.isdisjoint(group.places)]
        for group in due:
            self.blocks.append(group.read(self.token_ids, position))
            group.keep(going_on)
            self.token_ids[group.rows, position] = mixed_sample(
                group.decoder.logits(),
                None,
                0.0,
                temperature=self.temperature,
                uniforms=self.uniforms[position, group.rows],
                vocab_size=self.vocab_size,
            ).token_ids
        if not due:
            return None
        token_ids = self.token_ids[rows, position]
        logprobs = token_logprobs(student_logits, token_ids, temperature=self.temperature, vocab_size=self.vocab_size)
        return drawn._replace(
            token_ids=token_ids, student_logprobs=logprobs, from_teacher=self.from_teacher[rows, position]
        )

    def finish(self, lengths: list[int]) -> Tensor:
        """[B, T, H] the teacher's states at every position of the responses, which are complete; 0 beyond."""
        for group in self.groups:
            last = max(lengths[place] for place in group.places) - 1
            if last >= group.known:
                self.blocks.append(group.read(self.token_ids, last))
        width = max(lengths)
        states = self.blocks[0].states.new_zeros(len(lengths), width, self.blocks[0].states.shape[-1])
        for block in self.blocks:
            end = min(block.first + block.states.shape[1], width)
            states[block.rows, block.first : end] = block.states[:, : end - block.first]
        ends = torch.tensor(lengths).to(states.device, non_blocking=True)
        beyond = torch.arange(width, device=states.device) >= ends[:, None]
        return states.masked_fill_(beyond[..., None], 0)
