"""Models are code of others: what they raise while they are tried becomes one message of ours."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from minillm.config.schema import ConfigError
from minillm.foreign import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trying(model: "PreTrainedModel", what: str, advice: str) -> AbstractContextManager[None]:
    """Try something on a model.

    Args:
        model: whose forward pass, configuration or modules are called inside.
        what: what the model then cannot do, as the verb of a sentence: "be cut".
        advice: what to do about it, a sentence without its full stop.

    Raises ConfigError for whatever the model raises, of any class, but what says already what is wrong.
    """
    says_it = (FloatingPointError, torch.OutOfMemoryError)
    return foreign(f"{type(model).__name__} cannot {what}", ConfigError, advice=advice, passing=says_it)
