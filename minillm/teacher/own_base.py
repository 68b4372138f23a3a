"""The student's own weights as the teacher: those below its adapters, those of each step, or their moving average.

What is frozen is never held twice: the teacher is a model of its own modules around the very tensors of the student.
"""

import copy
from typing import TYPE_CHECKING

import torch

from minillm.config.schema import ConfigError
from minillm.model.adapters import has_adapters, without_adapters
from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def own_teacher(student: CausalLM, source: str) -> CausalLM:
    """A teacher of the student's weights.

    Args:
        student: the model that is trained.
        source: `base`, its weights below the adapters; `student`, its weights as they are whenever the teacher is
            asked; `ema`, a copy of what is trained, for `MovingAverage` to move.

    Returns the teacher. It computes as the student does: in the dtype of its base, under its autocast.

    Raises ConfigError for the base of a student without adapters.
    """
    model, head = student.model, "fused" if student.fused else "logits"
    if source == "base":
        if not has_adapters(model):
            raise ConfigError(
                "teacher.source is base, and the student has no adapters below which it would stay: set lora.rank, or "
                "name the checkpoint to start from as model.teacher too"
            )
        return CausalLM(without_adapters(shared_copy(model)), head, constant=True)
    if source == "student":
        return CausalLM(model, head, constant=True)
    return CausalLM(shared_copy(model, trained_too=False), head, constant=True)


def shared_copy(model: "PreTrainedModel", trained_too: bool = True) -> "PreTrainedModel":
    """The modules of a model once more, around the same tensors; without `trained_too`, what is trained is copied."""
    kept = [p for p in model.parameters() if trained_too or not p.requires_grad]
    same: dict[int, object] = {id(x): x for x in (*kept, *model.buffers())}
    for module in model.modules():
        scales = getattr(module, "quant_state", None)  # of bitsandbytes: tensors that are neither
        if scales is not None:
            same[id(scales)] = scales
    return copy.deepcopy(model, same)


class MovingAverage:
    """Of the student's trained weights over the optimiser steps, in the teacher's.

    Example:
        >>> import torch
        >>> from minillm.teacher.own_base import MovingAverage
        >>> student, teacher = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> average = MovingAverage(student, teacher, decay=0.75)
        >>> with torch.no_grad():
        ...     _ = student.weight.fill_(0.0), average.restart(), student.weight.fill_(4.0), average.update()
        >>> teacher.weight.item()
        1.0
    """

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module, decay: float) -> None:
        """`teacher` has the modules of `student`, and is moved in place."""
        self.decay = decay
        theirs = dict(teacher.named_parameters())
        self.pairs = {name: (theirs[name], p) for name, p in student.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restart(self) -> None:
        """The student's weights as they are."""
        for average, weight in self.pairs.values():
            average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay · average + (1 - decay) · student, after an optimiser step."""
        averages, weights = zip(*self.pairs.values(), strict=True)
        torch._foreach_lerp_(list(averages), list(weights), 1 - self.decay)

    @property
    def memory(self) -> dict[str, torch.Tensor]:
        """The average, for a checkpoint."""
        return {f"average.{name}": average.detach() for name, (average, _) in self.pairs.items()}

    @torch.no_grad()
    def remember(self, memory: dict[str, torch.Tensor]) -> None:
        """Restore the average that a checkpoint holds."""
        for name, (average, _) in self.pairs.items():
            average.copy_(memory[f"average.{name}"])
