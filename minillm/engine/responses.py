"""Responses in the making: who draws which of their tokens, by the coins that are thrown first.

A coin u₀ < α says that a position is the teacher's, before any token is known (minillm/model/coins.py). So a response
is a chain of requests: the student continues it up to the next position of the teacher, which draws one token. Each
response goes at its own pace, and an engine works on all of them at once: a coin of its own for every row and position
costs no more than shared ones. Without a teacher the chain is one request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from minillm.engine import Answer, Engine, Request


@dataclass
class Response:
    """One response, and what is known of it so far."""

    prompt: Sequence[int]
    coins: Sequence[bool]
    """For each position up to the limit, whether the teacher draws there."""
    seeds: Sequence[int]
    """For each position, of a request that begins there."""
    ends: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """As the engine that drew a token gave them."""

    @property
    def ended(self) -> bool:
        return len(self.token_ids) == len(self.coins) or bool(self.token_ids and self.token_ids[-1] in self.ends)

    @property
    def teachers(self) -> bool:
        """Whether the next token is the teacher's."""
        return self.coins[len(self.token_ids)]

    def request(self) -> Request:
        """For what comes next: the tokens up to the teacher's next turn, or its one token."""
        start = end = len(self.token_ids)
        while end < len(self.coins) and not self.coins[end]:
            end += 1
        return Request([*self.prompt, *self.token_ids], max(1, end - start), self.seeds[start])

    def add(self, answer: Answer) -> None:
        self.token_ids += answer.token_ids
        self.logprobs += answer.logprobs


class Voice(NamedTuple):
    """An engine, and the law by which it draws here."""

    engine: Engine
    law: dict[str, Any]


def responses_to(
    prompts: Sequence[Sequence[int]], ends: Sequence[int], alpha: float, uniforms: Tensor
) -> list[Response]:
    """Responses of which nothing is known yet. uniforms: [T, B, 2]; the first of a position throws its coin, the
    second one seeds what is drawn there."""
    coins, seeds = (uniforms[..., 0] < alpha).T.tolist(), (uniforms[..., 1] * 2**53).long().T.tolist()
    return [Response(*row, frozenset(ends)) for row in zip(prompts, coins, seeds, strict=True)]


def write(responses: Sequence[Response], student: Voice, teacher: Voice | None) -> None:
    """Have all of them written to their ends. The engines are awake.

    Raises ServerLost.
    """
    voices = {False: student, True: teacher}
    at_work = {False: 0, True: 0}

    def go_on(number: int) -> None:
        response = responses[number]
        if response.ended:
            return
        voice = voices[response.teachers]
        assert voice is not None  # there are no coins of the teacher without it
        at_work[response.teachers] += 1
        voice.engine.submit(number, response.request(), voice.law)

    for number in range(len(responses)):
        go_on(number)
    while any(at_work.values()):
        for which, voice in voices.items():
            if voice is None or not at_work[which]:
                continue
            for number, answer in voice.engine.finished():
                at_work[which] -= 1
                responses[number].add(answer)
                go_on(number)
