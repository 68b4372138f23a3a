"""What is printed: text of models and data that a terminal cannot be steered by, whatever it can show; and work that
goes on when nobody reads it any more."""

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0, DEL and C1, but tab and newline; what turns the direction of text; and halves of surrogate pairs."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    """The text with its control characters written as codes, so that none moves the cursor or sets a title."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < "\xff" else ascii(match[0])[1:-1], text)


def say(text: str, error: bool = False, coloured: bool = False) -> bool:
    """Print text with its control characters as codes; False where nobody reads any more. `coloured` shows what stands
    between ⟦ and ⟧ in colour on a terminal, unless NO_COLOR is set.

    A reader that has gone (`| head`) does not end a run: what is printed from then on goes nowhere.
    """
    try:
        shown = printable(text)
        if coloured and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            shown = re.sub("⟦.*?⟧", "\x1b[32m\\g<0>\x1b[0m", shown, flags=re.S)
        print(shown, file=sys.stderr if error else sys.stdout, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if error else sys.stdout).fileno())
        return False
    return True


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


def quiet_libraries() -> None:
    """No progress bars of loading and saving between our lines; and what transformers logs, which quotes the files of
    models, without control characters."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_printable_record)  # adds it once


def _printable_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(COLOUR.sub("", record.getMessage())), ()
    return True
