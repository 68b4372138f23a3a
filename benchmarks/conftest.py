"""The fixture of every benchmark, and what its JSON says of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from measuring import Measure

import minillm_kernels


@pytest.fixture
def measure(benchmark, request) -> Callable[..., Measure]:
    return lambda group, shape, dtype: Measure(benchmark, group, shape, dtype)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    for key in ("node", "release", "system"):
        machine_info.pop(key, None)
    machine_info.update(
        torch=torch.__version__,
        minillm_kernels=minillm_kernels.__version__,
        backends=minillm_kernels.available_backends(),
        instruction_set=_instruction_set(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
    )


def _instruction_set() -> str:
    try:
        from minillm_kernels import _core
    except ImportError:
        return "none"
    return _core.cpu.instruction_set()


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """The file is committed: medians and spread, not each round."""
    output_json.pop("commit_info", None)
    for b in output_json["benchmarks"]:
        b["stats"] = {k: b["stats"][k] for k in ("min", "median", "iqr", "rounds")}
        b.pop("options", None)
