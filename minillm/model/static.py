"""Decoding at fixed addresses, which a CUDA graph can hold: one launch a token instead of hundreds.

Keys and values lie in tensors with room for all tokens of a sequence, each at its position in it. So there is no
padding, sequences of any length stand side by side, and a new one takes the place of another without moving anything.
What a token may look at is computed from its position alone, windows included. The static caches of
`transformers` write all rows at one column: there, rows that join would have to be moved, and a window that fills up
changes what is launched.

Which models decode so is tried on a few tokens (`takes_graphs`); the others decode with the caches of `transformers`.

Legend: B rows, K room for tokens of a row, H hidden.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from minillm.config.schema import ConfigError
from minillm.model.decoder import Decoder, left_pad
from minillm.model.head import CausalLM
from minillm.model.masks import decodes_by_sdpa, of_positions, same_states, takes_masks

LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Those of the caches of transformers that hold keys and values and nothing else."""


CAPTURING = Lock()
"""One thread at a time makes a graph: where rollouts are sampled ahead, another may validate."""


class Columns:
    """A cache, as transformers asks it, that writes the token of each row at the position of that row."""

    is_compileable = False

    def __init__(self, kept: dict[int, list[Tensor]], position: Tensor, room: int) -> None:
        """kept: keys and values [B, heads, K, size] of each layer. position: [B] of the token that is read."""
        self.kept, self.position, self.room = kept, position, room
        self.rows = torch.arange(len(position), device=position.device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        all_keys, all_values = self.kept[layer]
        # Under autocast the caches of transformers keep values in the type of the keys, which rotation leaves in fp32.
        all_keys[self.rows, :, self.position] = keys[:, :, 0].to(all_keys.dtype)
        all_values[self.rows, :, self.position] = values[:, :, 0].to(all_values.dtype)
        return all_keys, all_values

    def get_seq_length(self, *layer: Any) -> int:
        return self.room - 1

    def get_query_offset(self, *layer: Any) -> int:
        return self.room - 1

    def get_mask_sizes(self, queries: int | Tensor, *layer: Any) -> tuple[int, int]:
        return self.room, 0


class StaticDecoder:
    """Reads a token of each row at a time, as a Decoder that has read the prompts, and writes nowhere else than it did
    before."""

    def __init__(self, read: Decoder, room: int) -> None:
        """read: with the rows and all that was read of them. room: tokens of the longest row, in the end."""
        if any(type(layer).__name__ not in LAYERS for layer in read.cache.layers):
            raise ConfigError(f"{type(read.model.model).__name__} keeps more of a sequence than keys and values")
        self.model, self.last = read.model, room - 1
        room = -(-room // 8) * 8  # as attention likes its masks
        rows = torch.arange(len(read.state), device=read.state.device)
        position, kept = torch.zeros_like(rows), {}
        for i, layer in enumerate(read.cache.layers):
            if layer.keys is not None:  # else it looks at what another has kept
                kept[i] = [x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in (layer.keys, layer.values)]
        self.cache, self.state = Columns(kept, position, room), read.state.clone()
        self.join(read, rows)

    def read(self, ids: Tensor) -> Tensor:
        """[B, 1, H] the states after the tokens `ids` [B, 1]."""
        position = self.cache.position
        masks = of_positions(self.model, position, self.cache.room)
        states = self.model.states(ids, masks, self.cache, position_ids=position[:, None])
        self.state.copy_(states[:, -1])
        position.add_(1).clamp_(max=self.last)  # of rows that have ended
        return states

    def logits(self) -> Tensor:
        """[B, V] of the token that comes next."""
        return self.model.logits(self.state)

    def keep(self, rows: Tensor, longest: int | None = None) -> None:
        """Go on with these rows, at new addresses."""
        kept = {i: [x[rows] for x in layer] for i, layer in self.cache.kept.items()}
        self.cache, self.state = Columns(kept, self.cache.position[rows], self.cache.room), self.state[rows]

    def join(self, other: Decoder, rows: Tensor) -> None:
        """The rows of `other` take the places of these `rows`."""
        lengths, columns = other.position[:, 0], torch.arange(self.cache.room, device=rows.device)
        for i, layer in self.cache.kept.items():
            for mine, theirs in zip(layer, (other.cache.layers[i].keys, other.cache.layers[i].values), strict=True):
                held = theirs.shape[2]  # the last columns, of which a short row has padding in front
                at = (columns + (held - lengths)[:, None]).clamp(0, held - 1)
                mine[rows] = theirs.take_along_dim(at[:, None, :, None], dim=2)
        self.cache.position[rows], self.state[rows] = lengths, other.state


class Replayed:
    """Work that reads and writes in place, whose shapes and addresses do not change. On a card it is launched once as
    it is, then held by a CUDA graph; elsewhere it is only called.

    The work comes with each call: were it kept, a graph would lie in a cycle of references with what it works on, and
    be freed when Python collects garbage, perhaps while another is captured, which that would break.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self, work: Callable[[], object]) -> None:
        """work: the same at every call."""
        if self.device.type != "cuda" or not self.warm:
            self.warm = True  # the first call makes what no graph may: workspaces, casts, kernels
            work()
            return
        if self.graph is None:
            self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
            with (
                CAPTURING,
                _no_garbage(),
                torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"),
            ):
                work()
        self.graph.replay()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """No collection meanwhile: it may free a graph of somebody else, which breaks the one that is captured."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def takes_graphs(lm: CausalLM) -> bool:
    """Whether a model decodes at fixed addresses as it does with a cache of transformers; tried once."""
    if lm.takes_graphs is None:
        try:
            lm.takes_graphs = takes_masks(lm) and _is_whole(lm) and _trial(lm)
        except Exception:  # whatever code of others raises at a cache that it does not know, or under capture
            lm.takes_graphs = False
    return lm.takes_graphs


def check_graphs(*models: CausalLM) -> None:
    """Refuse models that do not decode at fixed addresses."""
    for lm in models:
        if not takes_graphs(lm):
            raise ConfigError(
                f"rollout.cuda_graphs is true, but no CUDA graph can hold a step of {type(lm.model).__name__} "
                f"(attention: {lm.model.config._attn_implementation}): models can that are whole on their device, "
                "keep keys and values alone, look at all of them or at a window, and choose nothing by values on the "
                "host. Set it to auto, which decodes others token by token"
            )


def _is_whole(lm: CausalLM) -> bool:
    """Neither in shards nor computed by several processes, whose messages no graph holds."""
    return not any(hasattr(p, "device_mesh") for p in lm.parameters()) and not any(
        type(module).__name__.startswith("FSDP") for module in lm.modules()
    )


@torch.no_grad()
def _trial(lm: CausalLM) -> bool:
    """Three tokens behind two prompts, as a graph would hold them, against a Decoder; and one more, on tensors without
    values, of which nothing can be read by the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    padded = left_pad([[2, 3], [1, 2, 3, 4, 5]], 8, lm.device)
    token = torch.tensor([[3], [1]]).to(lm.device)
    # without autocast, which rounds more than the model, and would remember casts of no values
    with decodes_by_sdpa(lm), torch.autocast(lm.device.type, enabled=False):
        plain, static = (Decoder(lm, padded.exists, padded.any) for _ in range(2))
        for decoder in (plain, static):
            decoder.read(padded.ids)
        fixed = StaticDecoder(static, 12)
        read = Replayed(lm.device)
        for _ in range(3):
            read(lambda: fixed.read(token))
            plain.read(token)
            if not same_states(lm, fixed.state, plain.state):
                return False
        with FakeTensorMode(allow_non_fake_inputs=True):
            fixed.read(token)
    return True
