"""Which backend was asked for, in this thread or asyncio task: `name`, a variable of the context.

torch.compile does not trace a ContextVar, but it reads a module's attribute and guards the graph on its value: so
compiled code reads `request.name`, which __getattr__ takes from the context.
"""

from __future__ import annotations

import os
from contextvars import ContextVar

_FROM_OUTSIDE = os.environ.get("MINILLM_KERNELS_BACKEND") or "auto"
NAME: ContextVar[str] = ContextVar("minillm_kernels_backend", default=_FROM_OUTSIDE)


def __getattr__(attribute: str) -> str:
    if attribute == "name":
        return NAME.get()
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
