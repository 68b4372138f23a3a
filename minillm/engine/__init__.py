"""Engines that sample in place of our own decoder: vLLM, in this process or as a server.

An engine only draws tokens. What is learnt from them is read from our own models afterwards (rollout.py): an engine
rounds in its own way, and its weights may be a moment old. responses.py says who draws which token of a response,
pair.py makes the engines of a run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from minillm.model.sampling import Decoding


class Request(NamedTuple):
    """What to continue, and by how much."""

    prompt: Sequence[int]
    """Token ids."""
    max_tokens: int
    seed: int
    """Of all that is drawn for this request, whatever else the engine does at the same time."""


class Answer(NamedTuple):
    """The tokens drawn, the one that ended them included, and the engine's log-prob of each."""

    token_ids: list[int]
    logprobs: list[float]


class Engine(Protocol):
    """One model that draws tokens, for many requests at the same time."""

    def wake(self, length: int) -> None:
        """Be ready for sequences of this many tokens, by the weights as they are now."""

    def submit(self, number: int, request: Request, law: dict[str, Any]) -> None:
        """Begin a request; `law` is what `law_of` returns. Only while awake."""

    def finished(self) -> list[tuple[int, Answer]]:
        """The numbers and answers of requests that have ended since the last call; it works, or waits, a moment.

        Raises ServerLost.
        """

    def rest(self) -> None:
        """Drop what was begun, and give memory back until `wake`."""

    def close(self) -> None:
        """Nothing will be asked any more."""


def law_of(decoding: Decoding, vocab_size: int, rows: int) -> dict[str, Any]:
    """Sampling parameters, by the names that vLLM gives them in Python and over HTTP alike.

    Args:
        decoding: temperature, filters and the tokens that end a response.
        vocab_size: the columns that count.
        rows: all columns of the model's head; those that do not count are never drawn.
    """
    return {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,  # said, as all of these, so that no generation_config decides
        "stop_token_ids": list(decoding.ends),
        "ignore_eos": True,  # it is among these ends, or is none
        "logit_bias": {column: -100.0 for column in range(vocab_size, rows)} or None,
        "logprobs": 0,  # of the token drawn, and of no other
    }
