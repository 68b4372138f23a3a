"""Text is UTF-8 whatever the locale says, and what is printed never depends on what the terminal can show."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minillm
from minillm.files import read_lines, write_atomically
from minillm.terminal import print_anything, printable

SOURCES = sorted(Path(minillm.__file__).parent.rglob("*.py"))


def opens_as_text(call: ast.Call) -> bool:
    """`open(…)`, `path.open(…)`, `read_text` and `write_text`, but what opens bytes, archives or descriptors."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name != "open":
        return name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
    owner = getattr(getattr(call.func, "value", None), "id", "")
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return owner not in ("os", "tarfile", "wheel") and not {"rb", "wb", "ab", "xb"} & set(texts)


def without_encoding(code: str) -> list[int]:
    """Lines of a program that open text in the locale's encoding."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and opens_as_text(node)]
    return sorted(call.lineno for call in calls if "encoding" not in {keyword.arg for keyword in call.keywords})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_text_files_are_opened_as_utf8(path):
    found = without_encoding(path.read_text(encoding="utf-8"))
    assert not found, f"{path}, lines {found}: give encoding="


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_no_line_ends_at_a_separator_inside_of_a_text(path):
    assert ".splitlines(" not in path.read_text(encoding="utf-8"), "it breaks at U+2028: files.read_lines does not"


def test_the_lines_of_a_jsonl_file(tmp_path):
    rows = [{"text": f"a{separator}b"} for separator in "\u2028\u2029\x85\x0b\x0c\x1c\r"]
    write_atomically(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert [json.loads(line) for line in read_lines(tmp_path / "a.jsonl")] == rows


def test_the_scan_sees_every_way_of_opening():
    ways = ("open(a)", "open(a, 'w')", "p.open()", "(p / q).open('a')", "p.read_text()", "f(x).write_text(t)")
    assert without_encoding("\n".join(ways)) == [1, 2, 3, 4, 5, 6]
    assert not without_encoding("open(a, 'rb')\np.open('wb')\nos.open(a, 0)\np.open(encoding='utf-8')")


def test_control_characters_are_written_as_codes():
    assert printable("a\x1b]0;title\x07\x1b[2J\r\x9b1m\x7f\x85\tb\nc é") == (
        "a\\x1b]0;title\\x07\\x1b[2J\\x0d\\x9b1m\\x7f\\x85\tb\nc é"
    )
    assert printable("a\u202eb\u2066c\udcffd") == "a\\u202eb\\u2066c\\udcffd"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_what_is_printed_goes_through_say(path):
    """A signal handler apart, which prints words of ours."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    printing = [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
    assert not printing or path.name in ("terminal.py", "interrupt.py"), f"{path}, lines {printing}: say() escapes"


def test_a_reader_that_has_gone_does_not_end_a_run(files):
    """As in `minillm train … | head -1`, in a process of its own whose output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "minillm", "train", files / "recipe.yaml", "--optim.steps=2"],
        stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert result.returncode == 0 and b"Traceback" not in result.stderr and b"BrokenPipe" not in result.stderr
    assert (files / "run" / "model" / "config.json").exists() and (files / "run" / "summary.json").exists()


def test_an_ascii_terminal_gets_codes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_anything()
    print("⟦é⟧", flush=True)
    assert raw.getvalue() == b"\\u27e6\\xe9\\u27e7\n"
    monkeypatch.setattr(sys, "stdout", None)  # closed
    print_anything()


def test_a_run_under_an_ascii_locale(files):
    """Data, run directory and output, in a process of its own: the locale is read when Python starts."""
    row = '{"prompt": "Größe \u2028 \x1b[2J", "completion": "naïve"}\n'.replace("\x1b", "\\u001b")
    (files / "train.jsonl").write_text(row * 14, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    result = subprocess.run(
        [sys.executable, "-m", "minillm", "train", files / "recipe.yaml", "--optim.steps=1"],
        env={**os.environ, **ascii_only}, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    assert rb"Gr\xf6\xdfe" in result.stdout and b"\x1b" not in result.stdout
