"""Work goes on when nobody reads its output."""

import io
import os
import subprocess
import sys

import pytest

from minillm.cli import main
from minillm.terminal import unbroken_output


def stream_to(descriptor):
    return io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding="utf-8", line_buffering=True)


@pytest.fixture(params=["a closed pipe", "a full disk"])
def broken(request):
    if request.param == "a full disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        return stream_to(os.open("/dev/full", os.O_WRONLY))
    read, write = os.pipe()
    os.close(read)
    return stream_to(write)


def test_output_that_leads_nowhere_raises_nothing(broken, monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken)
    with pytest.raises(OSError):
        print("a line", flush=True)
    with unbroken_output():
        for _ in range(3):
            print("a line", flush=True)
        sys.stdout.flush()
        assert sys.stdout.encoding == "utf-8" and not sys.stdout.isatty()
    assert sys.stdout is broken
    broken.close()  # what it still held has gone nowhere as well


def test_a_stream_that_is_closed_altogether_stays_so(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with unbroken_output():
        print("a line")


def test_a_run_whose_reader_has_gone_is_trained_to_its_end(files, broken, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", broken)
        patched.setattr(sys, "stderr", broken)
        assert main(["distill", str(files / "recipe.yaml")]) == 0
    assert (files / "run" / "summary.json").exists()
    assert (files / "run" / "model" / "model.safetensors").exists()


def test_a_command_that_only_prints_ends_quietly():
    command = f"{sys.executable} -m minillm env | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    found = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    assert found.stdout.startswith("python: ") and found.stdout.count("\n") == 1
