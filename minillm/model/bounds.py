"""How large a model its configuration describes, found without room for it: damage, or a hostile hand, writes any
number there."""

import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from minillm.config.schema import ConfigError

LAYERS = 10_000
"""More than any model has; configurations make lists that long."""
SECONDS = 30
"""The longest that building a model without its weights takes, of the thread's own time: a busy machine is no
damage."""


def check_layers(config: dict[str, Any], source: str) -> None:
    """Refuse numbers of layers that no model has, in the raw configuration and its parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_layers(value, source)
        elif re.search("layer|block|depth", key) and type(value) is int and value > LAYERS:
            raise ConfigError(
                f"the configuration of {source!r} has {key} {value}: it is damaged, or describes no model"
            )


@contextmanager
def bounded(source: str, room: float = math.inf) -> Iterator[None]:
    """Models built here on the meta device, before they get memory, may have no more than `room` bytes, and may take
    no more than SECONDS to build."""
    size, end, thread = 0, time.thread_time() + SECONDS, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Tensor) -> None:
        nonlocal size
        if tensor.device.type != "meta" or threading.get_ident() != thread:
            return
        size += tensor.nbytes
        if size > room:
            raise ConfigError(
                f"the configuration of {source!r} describes a model of more than {size / 2**30:,.0f} GiB, which "
                "cannot be loaded here: it is damaged, or the model needs a larger machine or a smaller dtype"
            )
        if time.thread_time() > end:
            raise ConfigError(
                f"the configuration of {source!r} describes a model that is not built after {SECONDS} seconds: it is "
                "damaged, or describes no model"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def room() -> int:
    """Bytes that a model may take: twice the machine's memory, as it may be swapped or mapped from its file."""
    return 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
