"""The backends under test. "cpu" is one backend compiled for several instruction sets, and each must be right."""

import cases
import pytest
import torch

from minillm_kernels import available_backends, use_backend
from minillm_kernels.backends import cpu


@pytest.fixture(autouse=True)
def one_thread(reproducible):
    """Small tensors on shared cores: waiting for a second thread would take most of the time. The results are the same
    bits (test_threads.py)."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Triton runs the cases that its interpreter can finish, and is not listed with those that it leaves out."""

    def runs(item) -> bool:
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or "triton" not in (params.get("implementation"), params.get("backend")):
            return True
        if item.originalname in cases.NOT_INTERPRETED:
            return False
        if any(params.get(k, v[0]) not in v for k, v in cases.INTERPRETED_PARAMETERS.items()):
            return False
        case, law = params.get("case"), params.get("law")
        if law is not None:
            return law in cases.INTERPRETED_LAWS and (case is None or case in cases.INTERPRETED_MIXTURES)
        return not isinstance(case, cases.Case) or case in cases.INTERPRETED

    items[:] = [item for item in items if runs(item)]


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def select_instruction_set(name: str) -> None:
    if reason := cpu.backend.unavailable():
        pytest.skip(reason)
    if not cpu.operations.use_instruction_set(name):
        pytest.skip(f"this processor has no {name}")


@pytest.fixture
def core():
    """The compiled module, with its choice of instruction set given back."""
    if reason := cpu.backend.unavailable():
        pytest.skip(reason)
    chosen = cpu.operations.instruction_set()
    yield cpu.operations
    cpu.operations.use_instruction_set(chosen)


def _make_ready(request, backend: str) -> None:
    """Without a GPU the CUDA kernels run in their host build."""
    if backend == "cuda":
        request.getfixturevalue("cuda_on_host")


@pytest.fixture(params=[*(f"cpu-{name}" for name in INSTRUCTION_SETS), "cuda", "triton", "reference"])
def implementation(request):
    """Runs the test on each instruction set of the compiled backend and on the reference."""
    backend, _, instruction_set = request.param.partition("-")
    _make_ready(request, backend)
    if available_backends()[backend] != "ok":
        pytest.skip(available_backends()[backend])
    before = cpu.operations.instruction_set() if cpu.operations else None
    if instruction_set:
        select_instruction_set(instruction_set)
    with use_backend(backend):
        yield backend
    if before:
        cpu.operations.use_instruction_set(before)


@pytest.fixture(params=["cpu", "cuda", "triton", "reference"])
def backend(request):
    _make_ready(request, request.param)
    if available_backends()[request.param] != "ok":
        pytest.skip(available_backends()[request.param])
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, core):
    """Runs the test on each instruction set of the compiled backend alone."""
    select_instruction_set(request.param)
    with use_backend("cpu"):
        yield request.param
