"""One model with its key-value cache, over rows of which those that have ended are dropped.

Legend: B rows, L tokens of a row so far (left padding included), g tokens read at once, H hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.model.head import CausalLM


class Decoder:
    """Reads tokens, one or many at once, and keeps the state [B, H] after the last one of each row."""

    def __init__(self, model: CausalLM) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.model.config)
        self.mask: Tensor | None = None
        """[B, L], 0 on left padding."""

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, g, H] the states after each of the tokens `ids` [B, g]; `mask` [B, g] is 0 on padding."""
        fresh = torch.ones_like(ids) if mask is None else mask
        if self.mask is None:
            self.mask, self.length = fresh, torch.zeros_like(fresh[:, :1])
        else:
            self.mask = torch.cat([self.mask, fresh], dim=1)
        positions = (self.length + fresh.cumsum(dim=1) - 1).clamp(min=0)
        self.length = positions[:, -1:] + 1
        states = self.model.states(ids, self.mask, self.cache, position_ids=positions)
        self.state = states[:, -1]
        return states

    def logits(self) -> Tensor:
        """[B, V] of the token that comes next."""
        return self.model.logits(self.state)

    def keep(self, rows: Tensor, padding: int = 0) -> None:
        """Go on with these rows, in this order; a row may be repeated. They all begin with `padding` tokens of padding
        that are dropped, where the cache allows it."""
        from transformers.cache_utils import DynamicLayer

        assert self.mask is not None
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        mask, self.length, self.state = self.mask[rows], self.length[rows], self.state[rows]
        layers = [layer for layer in self.cache.layers if type(layer) is DynamicLayer]  # others count their tokens
        if padding and len(layers) == len(self.cache.layers):
            for layer in layers:
                layer.keys, layer.values = layer.keys[..., padding:, :], layer.values[..., padding:, :]  # type: ignore
            mask = mask[:, padding:]
        self.mask = mask


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, P] for the longest prompt of P tokens."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
