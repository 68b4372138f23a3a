"""The boundary to code of others that reads what others have written: files of models and data, templates, tables.

Such code objects by exceptions of any kind (of Rust, of Arrow, plain KeyErrors), and each becomes one error of ours,
which says what was read. The boundary stands around the foreign call alone: an error in our own code passes as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def foreign(failed: str, kind: type[Exception], advice: Callable[[], str] = str) -> Iterator[None]:
    """Turn what the block raises into an error of `kind` that says what `failed`, why, and what `advice` answers."""
    try:
        yield
    except Exception as error:
        more = advice()
        raise kind(f"{failed}: {reason(error)}" + (f". {more}" if more else "")) from error


def reason(error: Exception) -> str:
    """What an exception says, in one line; with its kind where it says too little, as a KeyError does."""
    words = " ".join(str(error).split())
    words = words if len(words) <= 500 else f"{words[:500]} …"
    return words if words.count(" ") > 1 else f"{type(error).__name__}: {words}".removesuffix(": ")
