"""Attention masks made from what the host knows, so that no forward pass waits for the device.

Of a padding mask, transformers reads whether it masks anything, and of positions, whether sequences share a row: once
per forward pass, which is once per token of a rollout, and under flash-attention once per layer and token. All that is
known where a batch is made. So rows that are padded at their ends go without a mask: under causal attention no token
that counts sees what follows it. Rows that are padded in front, and rows that hold several sequences, bring the masks
that transformers would make of them.

Whether a model takes them is tried on a few tokens (`takes_masks`); one that does not is called as before.

Legend: B rows, Q positions that are computed, K positions that they may look at, up to the last of Q.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.data.examples import Batch, collate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from minillm.model.head import CausalLM

Masks = Tensor | dict[str, Tensor] | None
"""What a model takes for `attention_mask`: one for all layers, or one for each type of layers."""


LOOKS_FOR_PADS = ("gpt2",)
"""Models that look for pad tokens, and warn, where they get no mask."""


class KeepsNothing:
    """A cache, as transformers asks it, of a forward pass that needs none. Where there is one, transformers does not
    look for sequences that share a row."""

    is_compileable = False

    def update(self, keys: Tensor, values: Tensor, *layer: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, *layer: Any) -> int:
        return 0

    def get_query_offset(self, *layer: Any) -> int:
        return 0

    def get_mask_sizes(self, queries: int | Tensor, *layer: Any) -> tuple[int, int]:
        """The positions themselves in older releases of transformers."""
        return (queries if isinstance(queries, int) else len(queries)), 0


def of_batch(lm: "CausalLM", batch: Batch) -> dict[str, Any]:
    """What the model reads of a batch whose rows are padded at their ends."""
    attention = lm.model.config._attn_implementation or ""
    if not takes_masks(lm) or (batch.position_ids is not None and "flash" in attention):
        return batch.inputs()
    if batch.position_ids is None:
        masks = of_padded(lm, torch.ones_like(batch.input_ids[:1], dtype=torch.bool), batch.input_ids.shape[1], False)
        return {"input_ids": batch.input_ids, "attention_mask": masks, "cache": KeepsNothing()}
    sequence = (batch.position_ids == 0).cumsum(1)
    together = sequence[:, None, :, None] == sequence[:, None, None, :]
    return batch.inputs() | {"attention_mask": for_layers(lm, together, batch.input_ids.shape[1])}


def of_padded(lm: "CausalLM", exists: Tensor, queries: int, padded: bool) -> Masks:
    """The masks of the last `queries` positions [B, Q], of rows whose positions `exists` [B, K] bool, others being
    padding in front, if any is `padded`. A position of padding looks at itself, so that its state is a number."""
    if not takes_masks(lm):
        return exists.long()
    if not padded and lm.model.config.model_type not in LOOKS_FOR_PADS:
        return None
    length = exists.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=exists.device)[-queries:]
    return for_layers(lm, exists[:, None, None, :] | itself, queries)


def for_layers(lm: "CausalLM", visible: Tensor, queries: int) -> Masks:
    """`visible` [B, 1, 1 or Q, K] bool, made causal, and cut for each type of layers to what its cache holds."""
    length, config = visible.shape[-1], lm.model.config.get_text_config()
    keys = torch.arange(length, device=visible.device)
    distance = keys[length - queries :, None] - keys
    causal, masks = visible & (distance >= 0), {}
    for kind in layer_types(config):
        mask = causal
        if kind == "sliding_attention":
            held = min(length, config.sliding_window - 1 + queries)
            mask = (causal & (distance < config.sliding_window))[..., length - held :]
        masks[kind] = mask
    return _given(lm, masks)


def of_positions(lm: "CausalLM", position: Tensor, room: int) -> Masks:
    """The masks of one token of each row, at its `position` [B], among keys [B, room] that lie at theirs."""
    distance = position[:, None, None, None] - torch.arange(room, device=position.device)
    causal, config, masks = distance >= 0, lm.model.config.get_text_config(), {}
    for kind in layer_types(config):
        masks[kind] = causal & (distance < config.sliding_window) if kind == "sliding_attention" else causal
    return _given(lm, masks)


def _given(lm: "CausalLM", masks: dict[str, Tensor]) -> Masks:
    """Masks [B, 1, Q, K] bool of each type of layers, as the model takes them."""
    if lm.model.config.get_text_config()._attn_implementation == "eager":  # adds them to the scores
        dtype = lm.model.dtype
        lowest = torch.finfo(dtype).min
        masks = {k: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest) for k, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_types(config: "PreTrainedConfig") -> set[str]:
    """The types of attention that the layers of a model have."""
    named = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None)
    return set(named) if named else {"sliding_attention" if windowed else "full_attention"}


def takes_masks(lm: "CausalLM") -> bool:
    """Whether the model gives the same states with these masks as with those that transformers makes; tried once."""
    if lm.takes_masks is None:
        config = lm.model.config.get_text_config()
        known = layer_types(config) <= {"full_attention", "sliding_attention"}
        with decodes_by_sdpa(lm), torch.autocast(lm.device.type, enabled=False):  # which rounds more than the model
            lm.takes_masks = False
            expected = _trial(lm) if known and config._attn_implementation in ("sdpa", "eager") else None
            lm.takes_masks = True
            found = _trial(lm)
        lm.takes_masks = found is not None and expected is not None and same_states(lm, found, expected)
    return lm.takes_masks


def same_states(lm: "CausalLM", found: Tensor, expected: Tensor) -> bool:
    """Whether they differ by no more than rounding in the model's dtype does."""
    rounding = 1e-2 if lm.model.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((found - expected).float().norm() <= rounding * expected.float().norm())


@torch.no_grad()
def _trial(lm: "CausalLM") -> Tensor | None:
    """States of two sequences: in padded rows, in one row, and decoded behind padding and without; None of a model
    that cannot be called so."""
    from transformers import DynamicCache

    prompts, responses = [[1, 2, 3, 4, 5], [2, 3]], [[3], [1, 5]]
    found = []
    try:
        for row_length in (0, 10 if lm.takes_masks else 0):  # packing is right where it changes nothing
            found.append(lm.output(collate(prompts, responses, row_length).to(lm.device)).states)
        ids = torch.tensor([[1, 2, 3, 4, 5, 3], [0, 0, 0, 2, 3, 1]], device=lm.device)
        for padding in (3, 0):
            exists = torch.ones_like(ids, dtype=torch.bool)
            exists[1, :padding] = False
            positions, cache = (exists.cumsum(1) - 1).clamp(min=0), DynamicCache(config=lm.model.config)
            for past, now in ((0, 5), (5, 6)):
                masks = of_padded(lm, exists[:, :now], now - past, padded=padding > 0)
                states = lm.states(ids[:, past:now], masks, cache, position_ids=positions[:, past:now])
                found.append(states[:, -1])
    except Exception:  # whatever code of others raises at a mask that it does not know
        return None
    return torch.cat(found).float()


@contextmanager
def decodes_by_sdpa(*models: "CausalLM") -> Iterator[None]:
    """Inside, models of flash-attention take torch's attention: flash-attention knows no mask and would gather the
    whole cache anew, without its padding, in every layer at every token."""
    flash = [(lm, name) for lm in models if "flash" in (name := lm.model.config._attn_implementation or "")]
    try:
        for lm, _ in flash:
            lm.model.config._attn_implementation = "sdpa"
        yield
    finally:
        for lm, name in flash:
            lm.model.config._attn_implementation = name
