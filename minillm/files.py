"""Files that are whole or absent, their checksums, and nested data as flat keys."""

import errno
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def partial_of(path: Path) -> Path:
    """Where this process writes a file or directory until it is whole: beside it, hidden."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove(path: Path) -> None:
    """Delete a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Delete what processes that were killed have left half-written in a folder."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name):
            remove(path)


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Gives the name under which to write a file or a directory; it takes the place of `path` when the block has
    ended, and is deleted when the block has failed."""
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        yield partial
        if partial.is_dir():
            remove(path)
        os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that is either absent or whole, whatever interrupts. It replaces a link, and leaves
    what that points to as it is."""
    with whole_or_absent(path) as partial, partial.open("xb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def check_writable(path: Path) -> None:
    """Raises OSError where a file could not be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a directory, and a file is to be written", str(path))
    with whole_or_absent(path.with_name(f"{path.name}.tried")) as partial:
        partial.touch()
    path.with_name(f"{path.name}.tried").unlink()


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file of ours. str.splitlines would also break at U+2028 and its like inside of a text."""
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def publish(source: Path, target: Path) -> None:
    """Move a finished directory into place; if another process was first, keep that one's."""
    try:
        os.replace(source, target)
    except OSError:
        if not target.exists():
            raise


def flush(path: Path) -> None:
    """Make sure that a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """CRC-32 of a file: it finds damage, which is all that is asked of it, at the speed of the memory."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def sha256(path: Path) -> str:
    """The digest by which files of others are known."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts by dotted path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
