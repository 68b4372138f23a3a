"""Vocabulary-wide losses, gathers and sampling for language-model distillation: one read of the logits, no softmax
tensor."""

from .backends import available_backends, last_backend, use_backend
from .losses import FusedRKLLoss, fused_divergence_loss, fused_rkl_loss
from .sampling import MixedSample, mixed_sample
from .statistics import DistillStats, distill_stats, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "DistillStats",
    "FusedRKLLoss",
    "MixedSample",
    "available_backends",
    "distill_stats",
    "fused_divergence_loss",
    "fused_rkl_loss",
    "last_backend",
    "mixed_sample",
    "token_logprobs",
    "use_backend",
]
