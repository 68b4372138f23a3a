"""The vocabulary head of a model.

Legend: H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments
from ..parallel.ranks import Ranks, local, ranks_of, replicated
from .matmul import linear


@dataclass(frozen=True, eq=False)  # eq=False: a head equals itself alone, and its hash is its identity
class Head:
    r"""A vocabulary head: how a model makes logits z of its last hidden states h.

    z = h W^T + b, then z * scale, then softcap * tanh(z / softcap). A temperature comes after and belongs to the loss.

    Wherever a head is expected the bare weight is accepted too, and stands for `Head(weight)`. `Head(None)` says that
    the hidden states are logits already; a function that is given one forms the logits of the other model whole, and
    is then its namesake on logits: the same call serves a model whose head cannot be read.

    Args:
        weight: [V, H] floating point, as `lm_head.weight`; a DTensor where its rows are split over ranks; or None,
            without any of the following.
        bias: [V], of the weight's type and split as it is, or None.
        softcap: a number > 0 (Gemma's `final_logit_softcapping`), or None.
        scale: a finite number (Cohere's `logit_scale`; 1 / `logits_scaling` of Granite).

    Raises:
        TypeError: weight or bias is no floating-point tensor.
        ValueError: a shape or a number does not fit.

    Examples:
        >>> import torch
        >>> from minillm_kernels import Head
        >>> head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), bias=torch.tensor([0.0, 0.0, 1.0]))
        >>> head.logits(torch.tensor([2.0, 3.0]))
        tensor([2., 3., 6.])
        >>> Head(head.weight, softcap=4.0).logits(torch.tensor([200.0, 300.0]))
        tensor([4., 4., 4.])
        >>> Head(None).logits(torch.tensor([2.0, 3.0]))
        tensor([2., 3.])
    """

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight is None:
            if self.bias is not None or self.softcap is not None or self.scale != 1.0:
                raise ValueError(
                    "Head(None) stands for logits that exist already: apply bias, softcap and scale to them, or pass "
                    "the weight"
                )
            return
        arguments.check_floating("the head's weight", self.weight)
        if self.weight.dim() != 2:
            raise ValueError(f"the head's weight must be [V, H], got shape {tuple(self.weight.shape)}")
        if self.bias is not None:
            arguments.check_floating("the head's bias", self.bias)
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(
                    f"the head's bias must be [{self.weight.shape[0]}], one number a row of the weight, got shape "
                    f"{tuple(self.bias.shape)}"
                )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a finite number > 0, or None for none, got {self.softcap}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale}")

    def detach(self) -> Head:
        """The same head as a constant: a teacher's.

        Returns:
            A Head on detached tensors that share the memory.

        Examples:
            >>> import torch
            >>> from minillm_kernels import Head
            >>> Head(torch.ones(5, 2, requires_grad=True)).detach().weight.requires_grad
            False
        """
        weight, bias = (None if x is None else x.detach() for x in (self.weight, self.bias))
        return Head(weight, bias, self.softcap, self.scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of these hidden states, all at once. Differentiable, though the losses never need them.

        Args:
            hidden: [..., H]; logits [..., V] for `Head(None)`.

        Returns:
            [..., V], in the type that `torch.nn.functional.linear` would give.

        Raises:
            ValueError: the last dimension is not the weight's.
        """
        if self.weight is None:
            return hidden
        check_hidden("hidden", hidden, self.weight)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type):  # which remembers linear's casts
            z = F.linear(hidden, self.weight, self.bias)
        else:
            z = linear(hidden.reshape(-1, hidden.shape[-1]), self.weight).reshape(*hidden.shape[:-1], -1)
            z = z if self.bias is None else z + self.bias
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def as_heads(*heads: Head | Tensor) -> tuple[Head, ...]:
    for head in heads:
        if not isinstance(head, (Head, Tensor)):
            raise TypeError(
                f"a head must be its weight [V, H] or a minillm_kernels.Head, got {type(head).__name__}: pass "
                "lm_head.weight, or Head(lm_head.weight, lm_head.bias)"
            )
    return tuple(Head(head) if isinstance(head, Tensor) else head for head in heads)


def models_here(group: object, *models: tuple[Tensor, Head]) -> tuple[Ranks | None, list[tuple[Tensor, Head]]]:
    """The ranks that the vocabulary is split over, None for a whole one, and what this one holds of each model: hidden
    states and the rows of the head, or for Head(None) the columns of the logits."""
    held = [(hidden, -1) if head.weight is None else (head.weight, 0) for hidden, head in models]
    ranks = ranks_of(group, *((x, dim) for x, dim in held if isinstance(x, Tensor)))
    return ranks, list(models) if ranks is None else [_here(ranks, *model) for model in models]


def _here(ranks: Ranks, hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    if head.weight is None:
        return local(hidden), head
    head = Head(local(head.weight), local(head.bias), head.softcap, head.scale)
    differentiable = isinstance(hidden, Tensor) and hidden.requires_grad and torch.is_grad_enabled()
    return replicated(hidden, ranks) if differentiable else hidden, head


def check_hidden(name: str, hidden: Tensor, weight: Tensor) -> None:
    arguments.check_floating(name, hidden)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} must be [..., H] and the weight of its head [V, H], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
