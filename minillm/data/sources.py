"""Sources of data: a JSONL, JSON, CSV or Parquet file, a directory of `datasets`, a hub id or `package:NAME` → rows.

Text is UTF-8, whatever the locale, with or without a byte-order mark. A line ends with a line feed and nothing else:
str.splitlines also breaks at U+2028 and its like, which JSON allows inside a text.
"""

import codecs
import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.data import packages
from minillm.foreign import foreign

HUB = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")
FILES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv")
COMPRESSED = {  # first bytes: suffix, command
    b"\x1f\x8b": (".gz", "gunzip -k"),
    b"BZh": (".bz2", "bunzip2 -k"),
    b"\xfd7zXZ": (".xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": (".zst", "unzstd"),
    b"PK\x03\x04": (".zip", "unzip"),
}
INSTALL = 'pip install "minillm-kernels[data]"'


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record and what was expected."""


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, with where it stands ("train.jsonl, record 3").

    Raises FileNotFoundError for a source that is none, DataError for one that cannot be read.
    """
    path = locate(source)
    if path is None or path.is_dir():
        read = _dataset(source, path)
    elif path.suffix == ".parquet":
        read = _parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        read = _csv(path)
    else:
        read = _json(path)
    for i, row in enumerate(read, 1):
        yield f"{source if path is None else path}, record {i}", row


def locate(source: str) -> Path | None:
    """Path of the file or directory; None for a hub id."""
    if source.startswith(packages.PREFIX):
        return packages.data_file(source.removeprefix(packages.PREFIX))
    path = Path(source)
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{path} is neither a file nor a directory: write what comes from a pipe into a file first")
    suffixes = (*FILES, *(suffix for suffix, _ in COMPRESSED.values()))
    if HUB.fullmatch(source) and not source.endswith(suffixes):
        return None
    raise FileNotFoundError(
        f"no data at {source!r}: give the path of a JSONL, JSON, CSV or Parquet file or of a `datasets` directory, a "
        "hub id (ORG/NAME or ORG/NAME:SPLIT), or package:NAME with NAME one of "
        f"{', '.join((*packages.DATA, *packages.JOINED))}"
    )


def whole_text(path: Path) -> str:
    """The text of a file. Raises DataError where it is not UTF-8."""
    return "".join(_lines(path)).replace("\r\n", "\n")


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends. Raises DataError for bytes that are not UTF-8 and says which, and what to do."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                _check_beginning(path, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, byte {error.start + 1} is {line[error.start]:#04x}, which is not UTF-8. "
                    f"Convert the file from the encoding it was written in, for example: {_convert(path, 'latin1')}"
                ) from error


def _check_beginning(path: Path, line: bytes) -> None:
    for mark, (suffix, command) in COMPRESSED.items():
        if line.startswith(mark):
            raise DataError(
                f"{path} is compressed ({suffix}): unpack it first, for example: {command} {shlex.quote(str(path))}"
            )
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or b"\0" in line[:4]:
        raise DataError(
            f"{path} looks like UTF-16 or UTF-32 (its first bytes are {line[:4].hex(' ')}); expected UTF-8. Convert "
            f"it, for example: {_convert(path, 'utf-16')}"
        )


def _convert(path: Path, encoding: str) -> str:
    name, new = (shlex.quote(str(path.with_name(name))) for name in (path.name, f"{path.stem}-utf8{path.suffix}"))
    return f"iconv -f {encoding} -t utf-8 {name} > {new}"


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one a line, or of one JSON list."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if first.lstrip().startswith("["):
        yield from _json_list(path)
        return
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        see = f"To see it: sed -n {number}p {shlex.quote(str(path))}"
        row = _parse(line, f"{path}, line {number} is not JSON", f"expected one object a line, or one list. {see}")
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} holds a {type(row).__name__}: expected one object a line. {see}")
        yield row


def _json_list(path: Path) -> Iterator[dict[str, Any]]:
    wanted = "expected one JSON list of objects, or one object a line"
    rows = _parse(whole_text(path), f"{path} begins like a JSON list and is none", wanted)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {i} of the list is a {type(row).__name__}: {wanted}")
        yield row


def _parse(text: str, what: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, thousands of brackets
        raise DataError(f"{what} ({error}): {wanted}") from error


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows under the names of the first line; a .tsv is separated by tabs."""
    csv.field_size_limit(1 << 30)  # the usual one, 128 Ki characters, is shorter than a document
    reader = csv.DictReader(_lines(path), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                much, names = "more" if None in row else "fewer", ", ".join(reader.fieldnames or [])
                raise DataError(
                    f"{path}, line {reader.line_num}: the row has {much} fields than the first line, which names "
                    f"{names}. Quote a field that holds the separator"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path} is not CSV after line {reader.line_num} ({error})") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: {INSTALL}") from error
    with foreign(f"{path} is not a Parquet file, or damaged", DataError), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _dataset(source: str, path: Path | None) -> Iterator[dict[str, Any]]:
    """What `save_to_disk` wrote, or what `load_dataset` finds in a directory or on the hub (it runs no code of
    theirs)."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading {source} needs the package datasets: {INSTALL}") from error
    name, _, split = (source, "", "") if path else source.partition(":")
    saved = path and any((path / mark).exists() for mark in ("state.json", "dataset_dict.json"))
    with foreign(f"datasets could not load {source!r}", DataError):
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name, split=split or None)
    if isinstance(data, dict):
        if len(data) > 1 and "train" not in data:
            raise DataError(f"{source} has the splits {', '.join(data)}: name one, as in ORG/NAME:SPLIT")
        data = data["train"] if "train" in data else next(iter(data.values()))
    with foreign(f"datasets could not read {source!r}", DataError):
        yield from data
