"""One model with its cache, over rows of which those that have ended are dropped, and others join.

All rows end at one column: a row that is shorter than the longest has padding in front, whether it began shorter or
joined later. So rows that join are moved to the last column and the longest row decides how many columns there are.
Keys know the position of their token, not its column, and the recurrent state of a row has no columns at all.

Legend: B rows, P longest prompt, g tokens read at once, H hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from minillm.model.head import CausalLM
from minillm.model.masks import of_padded, same_states


class Padded(NamedTuple):
    """Prompts behind padding."""

    ids: Tensor
    """[B, P]"""
    exists: Tensor
    """[B, P + new tokens] bool, what is no padding."""
    any: bool
    """Whether there is padding."""


def left_pad(prompts: Sequence[Sequence[int]], new_tokens: int, device: torch.device) -> Padded:
    """Prompts that end at one column, with room for new tokens."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    exists = torch.arange(longest + new_tokens) >= longest - torch.tensor(lengths)[:, None]
    ids, exists = (tensor.to(device, non_blocking=True) for tensor in (ids, exists))
    return Padded(ids, exists, min(lengths) < longest)


class Decoder:
    """Reads tokens, one or many at once, and keeps the state [B, H] after the last one of each row."""

    def __init__(self, model: CausalLM, exists: Tensor, padded: bool) -> None:
        """`exists` and `padded` as in Padded."""
        from transformers import DynamicCache

        self.model, self.exists, self.padded = model, exists, padded
        self.cache: Any = DynamicCache(config=model.model.config)
        self.last = exists.shape[1] - 1
        """The last position of a row. Rows that have ended would go beyond, where a model may have none."""
        self.length = 0
        """Tokens of a row that have been read, its padding included."""
        self.position = torch.zeros(len(exists), 1, dtype=torch.long, device=exists.device)
        """[B, 1] of the next token."""

    def read(self, ids: Tensor) -> Tensor:
        """[B, g, H] the states after each of the tokens `ids` [B, g]."""
        new, self.length = slice(self.length, self.length + ids.shape[1]), self.length + ids.shape[1]
        exists = self.exists[:, : self.length]
        positions = (self.position + exists[:, new].cumsum(dim=1) - 1).clamp(0, self.last)
        masks = of_padded(self.model, exists, ids.shape[1], self.padded)
        states = self.model.states(ids, masks, self.cache, position_ids=positions)
        self.position, self.state = positions[:, -1:] + 1, states[:, -1]
        return states

    def logits(self) -> Tensor:
        """[B, V] of the token that comes next."""
        return self.model.logits(self.state)

    def keep(self, rows: Tensor, longest: int | None = None) -> None:
        """Go on with these rows, in this order; a row may be repeated. The longest of them has `longest` tokens:
        columns in front of these are dropped, where the cache allows it."""
        self.cache.reorder_cache(rows)
        self.exists, self.position, self.state = self.exists[rows], self.position[rows], self.state[rows]
        if longest is not None and _is_known(self.cache):
            self._end_at(longest)

    def join(self, other: "Decoder") -> None:
        """Go on with the rows of `other` as well, after these; `other` is used up. For models that `takes_rows`."""
        length, self.last = max(self.length, other.length), max(self.last, other.last)
        self.padded |= other.padded or self.length != other.length
        for decoder in (self, other):
            decoder._end_at(length)
        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in STATES:
                mine: Any = getattr(layer, name, None)
                theirs: Any = getattr(more, name, None)
                if isinstance(mine, dict):  # one of each kind of state
                    both = {k: None if state is None else torch.cat([state, theirs[k]]) for k, state in mine.items()}
                    setattr(layer, name, both)
                elif mine is not None:
                    setattr(layer, name, torch.cat([mine, theirs]))
        room = max(decoder.exists.shape[1] for decoder in (self, other))
        exists = [pad(each.exists, (0, room - each.exists.shape[1]), value=True) for each in (self, other)]
        self.exists, self.position = torch.cat(exists), torch.cat([self.position, other.position])
        self.state = torch.cat([self.state, other.state])

    def _end_at(self, length: int) -> None:
        """Move the last column that was read to `length`: columns of padding come or go in front."""
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is None or not layer.keys.numel():
                continue
            held = length
            if hasattr(layer, "sliding_window"):
                held = min(length, layer.sliding_window - 1)
                layer.cumulative_length = length
            if more := held - layer.keys.shape[-2]:
                layer.keys, layer.values = pad(layer.keys, (0, 0, more, 0)), pad(layer.values, (0, 0, more, 0))
        self.exists, self.length = pad(self.exists, (length - self.length, 0), value=False), length


LAYERS = (
    "DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer", "DummyLayer",
)  # fmt: skip
"""Those of the caches of transformers that hold STATES and nothing else of their rows."""
STATES = ("keys", "values", "conv_states", "recurrent_states")


def _is_known(cache: Any) -> bool:
    return all(type(layer).__name__ in LAYERS for layer in cache.layers)


def takes_rows(lm: CausalLM) -> bool:
    """Whether rows that have been read apart can be decoded together (`Decoder.join`); tried once."""
    if lm.takes_rows is None:
        types = getattr(lm.model.config.get_text_config(), "layer_types", None) or ()
        try:
            with torch.autocast(lm.device.type, enabled=False):  # which rounds more than the model
                lm.takes_rows = "chunked_attention" not in types and _trial(lm)  # chunks begin at fixed columns
        except Exception:  # whatever code of others raises at a cache that was put together
            lm.takes_rows = False
    return lm.takes_rows


@torch.no_grad()
def _trial(lm: CausalLM) -> bool:
    """Of two prompts, the longer joins the shorter one that is three tokens ahead; and the other way round."""
    prompts, tokens = [[2, 3], [1, 2, 3, 4, 5]], torch.tensor([[3], [1]], device=lm.device)

    def alone(i: int) -> Decoder:
        padded = left_pad([prompts[i]], 8, lm.device)
        decoder = Decoder(lm, padded.exists, padded.any)
        decoder.read(padded.ids)
        return decoder

    for ahead, behind in ((0, 1), (1, 0)):
        apart, together = (alone(ahead), alone(behind)), alone(ahead)
        if not _is_known(together.cache):
            return False
        for decoder in (apart[0], together):
            for _ in range(3):
                decoder.read(tokens[:1])
        together.join(alone(behind))
        for _ in range(2):
            found = together.read(tokens)
            expected = torch.cat([each.read(token) for each, token in zip(apart, tokens.split(1), strict=True)])
            if not same_states(lm, found, expected):
                return False
    return True
