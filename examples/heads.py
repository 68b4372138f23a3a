"""The vocabulary heads of two `transformers` models, as the fused linear losses take them.

Logits are softcap(logit_scale · (h Wᵀ + b)). Which of these steps a family has stands in its config, under several
names; a step left out would train another objective without a word.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def heads(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments for fused_linear_*: weights, biases, soft-caps and scales; the teacher's as constants."""
    weight, bias, softcap, scale = _head(student)
    teacher_weight, teacher_bias, teacher_softcap, teacher_scale = _head(teacher)
    return {
        "student_weight": weight,
        "student_bias": bias,
        "teacher_weight": teacher_weight.detach(),
        "teacher_bias": None if teacher_bias is None else teacher_bias.detach(),
        "softcap": (softcap, teacher_softcap),
        "logit_scale": (scale, teacher_scale),
    }


def _head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None, float | None, float]:
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if scale is None:
        scale = 1 / getattr(config, "logits_scaling", 1)  # Granite divides
    return linear.weight, getattr(linear, "bias", None), getattr(config, "final_logit_softcapping", None), scale
