"""What every test starts from: a fixed seed; torch's thread count is given back afterwards. Where there is no GPU,
Triton's kernels run in its interpreter, which must be said before anything imports triton, and the CUDA kernels are
compiled for the host."""

import os

import host_build
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def reproducible():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def host_cuda_kernels():
    """csrc/cuda compiled by g++ (tests/tools/host_build.py)."""
    if reason := host_build.missing():
        pytest.skip(reason)
    return host_build.module()


@pytest.fixture
def cuda_on_host(host_cuda_kernels, monkeypatch):
    """The backend "cuda" takes CPU tensors and runs the host build of its kernels."""
    from minillm_kernels.backends import choose, cuda

    host = host_build.backend(host_cuda_kernels)
    monkeypatch.setattr(cuda, "backend", host)
    monkeypatch.setitem(choose.BACKENDS, "cuda", host)
    yield host_cuda_kernels
    host_cuda_kernels.processors(132)  # those of an H100
    host_cuda_kernels.shared_memory(227 << 10)
    host_cuda_kernels.most_blocks_a_cluster(8)
