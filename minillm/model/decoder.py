"""One model with its key-value cache, over rows of which those that have ended are dropped.

Legend: B rows, P longest prompt, g tokens read at once, H hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.model.head import CausalLM
from minillm.model.masks import of_padded


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
        self.cache = DynamicCache(config=model.model.config)
        self.length = 0
        """Tokens of a row that have been read, its padding included."""
        self.position = torch.zeros(len(exists), 1, dtype=torch.long, device=exists.device)
        """[B, 1] of the next token."""

    def read(self, ids: Tensor) -> Tensor:
        """[B, g, H] the states after each of the tokens `ids` [B, g]."""
        new, self.length = slice(self.length, self.length + ids.shape[1]), self.length + ids.shape[1]
        exists = self.exists[:, : self.length]
        positions = (self.position + exists[:, new].cumsum(dim=1) - 1).clamp(min=0)
        masks = of_padded(self.model, exists, ids.shape[1], self.padded)
        states = self.model.states(ids, masks, self.cache, position_ids=positions)
        self.position, self.state = positions[:, -1:] + 1, states[:, -1]
        return states

    def logits(self) -> Tensor:
        """[B, V] of the token that comes next."""
        return self.model.logits(self.state)

    def keep(self, rows: Tensor, padding: int = 0) -> None:
        """Go on with these rows, in this order; a row may be repeated. They all begin with `padding` tokens of padding
        that are dropped, where the cache allows it."""
        from transformers.cache_utils import DynamicLayer

        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.exists, self.position, self.state = self.exists[rows], self.position[rows], self.state[rows]
        layers = [layer for layer in self.cache.layers if type(layer) is DynamicLayer]  # others count their tokens
        if padding and len(layers) == len(self.cache.layers):
            for layer in layers:
                layer.keys, layer.values = layer.keys[..., padding:, :], layer.values[..., padding:, :]  # type: ignore
            self.exists, self.length = self.exists[:, padding:], self.length - padding
