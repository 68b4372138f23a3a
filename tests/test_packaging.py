"""The lower bounds of the dependencies are the versions that the suite has been run with."""

import re
from pathlib import Path

import pytest

from minillm_kernels.backends import triton as backend

ROOT = Path(__file__).parents[1]


def test_every_lower_bound_is_a_version_that_is_tested():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["data"], *extras["lora"], *extras["teach"], *extras["report"]]
    bounds = dict(requirement.split(">=") for requirement in wanted)
    tested = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE)
    oldest = {name: version for name, version in reversed(tested)}  # a line for newer Pythons comes second
    (bound,) = re.findall(r"triton>=([\d.]+);", " ".join(extras["dev"]))
    triton = [int(x) for x in oldest.pop("triton").split(".")]
    assert backend.OLDEST == tuple(triton[:2]) == tuple(int(x) for x in bound.split("."))
    release = {name: re.sub(r"(\.0)+$", "", version) for name, version in oldest.items()}
    assert release == {name: re.sub(r"(\.0)+$", "", version) for name, version in bounds.items()}
