"""What is printed: text of models and data that a terminal cannot be steered by, whatever it can show; and work that
goes on when nobody reads it any more."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0, DEL and C1, but tab and newline


def printable(text: str) -> str:
    """The text with its control characters written as codes, so that none moves the cursor or sets a title."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_anything() -> None:
    """Let standard output write the characters it lacks, such as those of an ASCII locale, as codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Unbroken:
    """A stream whose reader may go away, as `head -1` does, or whose disk may fill up: from then on what is written
    goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def silence(stream: TextIO) -> None:
    """Let the descriptor of a stream lead nowhere, for what it still holds as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def unbroken_output() -> Iterator[None]:
    """Work that must not end because its output has nowhere to go."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Unbroken(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
