"""What is printed: text of models and data that a terminal cannot be steered by, whatever it can show."""

import io
import re
import sys

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0, DEL and C1, but tab and newline


def printable(text: str) -> str:
    """The text with its control characters written as codes, so that none moves the cursor or sets a title."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_anything() -> None:
    """Let standard output write the characters it lacks, such as those of an ASCII locale, as codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
