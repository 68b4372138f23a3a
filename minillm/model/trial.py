"""Models are code of others: what they raise while they are tried becomes one message of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from minillm.config.schema import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASSED_ON = (ConfigError, FloatingPointError, torch.OutOfMemoryError)
"""Errors that say what is wrong already."""


@contextmanager
def trying(model: "PreTrainedModel", what: str, advice: str) -> Iterator[None]:
    """Try something on a model.

    Args:
        model: whose forward pass, configuration or modules are called inside.
        what: what the model then cannot do, as the verb of a sentence: "be cut".
        advice: what to do about it, a sentence without its full stop.

    Raises ConfigError for whatever the model raises, of any class.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        why = f"{type(error).__name__}: {' '.join(lines[:2])[:300]}".rstrip(": ")
        raise ConfigError(f"{type(model).__name__} cannot {what} ({why}). {advice}") from error
