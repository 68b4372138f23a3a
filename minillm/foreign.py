"""The boundary to code of others that reads what others have written: files of models and data, templates, tables.

Such code objects by exceptions of any kind (of Rust, of Arrow, plain KeyErrors), and each becomes one error of ours,
which says what was read. The boundary stands around the foreign call alone: an error in our own code passes as it is.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def foreign(
    failed: str,
    kind: type[Exception],
    diagnose: Callable[[], str] = str,
    advice: str = "",
    passing: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn what the block raises into an error of `kind` that says what `failed` and why: as `diagnose` finds, else in
    the words of the exception; and `advice`, what to do about it. Errors of `kind` pass as they are, those that are
    `passing` too, and so does a full disk: no file's fault."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"  # of Rust code, and no Exception
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, (kind, *passing)) or full or not (isinstance(error, Exception) or panic):
            raise
        why = diagnose() or reason(error)
        raise kind(f"{failed} ({why}). {advice}" if advice else f"{failed}: {why}") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line; with its kind where it says too little, as a KeyError does."""
    words = " ".join(str(error).split())
    words = words if len(words) <= 500 else f"{words[:500]} …"
    return words if " " in words else f"{type(error).__name__}: {words}".removesuffix(": ")
