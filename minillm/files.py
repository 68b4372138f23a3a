"""Files that are whole or absent, and nested data as flat keys."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, that is either absent or whole, whatever interrupts. It replaces a link, and leaves
    what that points to as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    os.replace(partial, path)


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


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts by dotted path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
