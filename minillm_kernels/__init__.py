"""Vocabulary-wide losses, gathers and sampling for language-model distillation: one read of the logits, no softmax
tensor.

`logits` has the functions on logits that exist, `hidden` the same on hidden states and vocabulary heads.
"""

from .backends.choose import available_backends, last_backend, use_backend
from .hidden.head import Head
from .hidden.losses import FusedLinearRKLLoss, fused_linear_divergence_loss, fused_linear_rkl_loss
from .hidden.minillm import fused_linear_minillm_loss
from .hidden.statistics import fused_linear_distill_loss, fused_linear_distill_stats, fused_linear_token_logprobs
from .logits.losses import FusedRKLLoss, fused_divergence_loss, fused_rkl_loss
from .logits.minillm import MiniLLMLoss, minillm_loss
from .logits.sampling import MixedSample, mixed_sample
from .logits.statistics import DistillLoss, DistillStats, distill_loss, distill_stats, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "DistillLoss",
    "DistillStats",
    "FusedLinearRKLLoss",
    "FusedRKLLoss",
    "Head",
    "MiniLLMLoss",
    "MixedSample",
    "available_backends",
    "distill_loss",
    "distill_stats",
    "fused_divergence_loss",
    "fused_linear_distill_loss",
    "fused_linear_distill_stats",
    "fused_linear_divergence_loss",
    "fused_linear_minillm_loss",
    "fused_linear_rkl_loss",
    "fused_linear_token_logprobs",
    "fused_rkl_loss",
    "last_backend",
    "minillm_loss",
    "mixed_sample",
    "token_logprobs",
    "use_backend",
]
