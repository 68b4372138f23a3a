"""YAML of recipes and of flags as plain values."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from minillm.config.schema import ConfigError
from minillm.foreign import foreign

DEPTH, SIZE = 50, 100_000
"""How deep a recipe nests and how many values it holds at most, aliases written out."""


def parse(text: str | bytes, what: str) -> Any:
    """The value of some YAML. Raises ConfigError, which says `what` is none, and where."""
    with foreign(f"{what} is not valid YAML", ConfigError):
        value = yaml.safe_load(text)
    if _size(value, {}) > SIZE:
        raise ConfigError(
            f"{what} nests more than {DEPTH} levels or holds more than {SIZE} values, where aliases (*name) are "
            "written out: a recipe needs neither"
        )
    return value


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _size(value: Any, known: dict[int, float], depth: int = 0) -> float:
    """Values that it holds, itself included; infinite where it is too deep or holds itself."""
    if not isinstance(value, (Mapping, list)):
        return 1
    if depth > DEPTH:
        return math.inf
    if id(value) not in known:
        known[id(value)] = math.inf  # until its parts are counted
        parts = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(part, known, depth + 1) for part in parts)
    return known[id(value)]
