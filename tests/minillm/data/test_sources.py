"""Files as they come: encodings, byte-order marks, compression, lists, CSV, separators inside of a text."""

import gzip
import json

import pytest

from minillm.data.examples import read_records, read_text
from minillm.data.sources import DataError, rows

ROWS = [{"prompt": f"größer als {i}?", "completion": "naïve"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(tmp_path, content, name="data.jsonl"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path / name)


def prompts(path):
    return [(record.prompt, record.answer) for record in read_records(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", LINES.encode("utf-8-sig")),
        ("data.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("data.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode("utf-8-sig")),
        ("data.jsonl", b"\n \n" + json.dumps(ROWS).encode()),
        ("data.csv", ("prompt,completion\n" + "".join(f"{r['prompt']},naïve\n" for r in ROWS)).encode("utf-8-sig")),
        ("data.tsv", "prompt\tcompletion\r\n" + "".join(f"größer als {i}?\tnaïve\r\n" for i in range(3))),
    ],
    ids=["bom", "crlf", "list", "list-in-jsonl", "csv", "tsv"],
)  # fmt: skip
def test_forms_that_hold_the_same_records(tmp_path, name, content):
    assert prompts(write(tmp_path, content, name)) == [(row["prompt"], row["completion"]) for row in ROWS]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    text = f"one{separator}two"
    quoted = json.dumps({"prompt": text}, ensure_ascii=False)
    assert [record.prompt for record in read_records(write(tmp_path, f"{quoted}\n{quoted}\n"))] == [text, text]
    assert read_text(write(tmp_path, text, "a.txt")) == [text]


def test_csv_fields_may_hold_lines_separators_and_whole_documents(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path, f'instruction,input,output\n"Say ""a, b""\nand c",,{long}\n', "data.csv")
    (record,) = read_records(path)
    assert (record.prompt, record.input, record.answer) == ('Say "a, b"\nand c', "", long)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES.encode("utf-16"), r"a.jsonl looks like UTF-16.*iconv -f utf-16 -t utf-8 \S+ > \S+a-utf8"),
        ("a.jsonl", LINES.encode("utf-16-le"), "looks like UTF-16"),
        ("a.jsonl", LINES.encode("utf-16-be"), "looks like UTF-16"),
        ("a.json", json.dumps(ROWS).encode("utf-32"), "looks like UTF-16 or UTF-32"),
        ("a.txt", "größer".encode("utf-16"), "looks like UTF-16"),
        ("a.csv", "prompt\ngrößer\n".encode("utf-16"), "looks like UTF-16"),
        ("a.jsonl", b"\n" + LINES.encode("latin-1"), "a.jsonl, line 2, byte 15 is 0xf6, .*iconv -f latin1"),
        ("a.json", ("[\n" + LINES).encode("cp1252"), r"a.json, line 2, byte \d+ is 0xf6"),
        ("a.csv", "prompt\n你好\n".encode("gb18030"), r"a.csv, line 2, byte 1 is 0xc4, which is not UTF-8"),
        ("a.txt", "größer".encode("latin-1"), "a.txt, line 1, byte 3 is 0xf6"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), r"\(.gz\): unpack it first, .*: gunzip -k \S+.gz"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), r"compressed \(.gz\)"),
        ("a.txt", gzip.compress(b"text", mtime=0), r"compressed \(.gz\)"),
        ("a.jsonl", b"PK\x03\x04", r"compressed \(.zip\)"),
        ("a.json", b"[{}", "begins like a JSON list and is none .*: expected one JSON list"),
        ("a.jsonl", b'{"prompt": 1' + b"0" * 5000 + b"}", "line 1 is not JSON .*digits"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1 is not JSON .*recursion"),
        ("a.csv", "prompt,completion\na\n", "line 2: .* fewer fields .*, which names prompt, completion"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv, line 2: the row has more fields"),
        ("a.csv", 'prompt\n"a"b\n', "a.csv is not CSV after line 1"),
        ("a.csv", "question,answer\na,b\n", r"a.csv, record 1: found the columns \['answer', 'question'\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, name, content, message):
    path = write(tmp_path, content, name)
    with pytest.raises(DataError, match=message):
        read_text(path) if name.endswith(".txt") else read_records(path)


@pytest.mark.parametrize("name", ["data/none.jsonl.gz", "data/none.csv", "data/none.tsv", "data/none.zip"])
def test_a_missing_file_is_no_hub_id(name):
    with pytest.raises(FileNotFoundError, match="no data at"):
        next(rows(name))
