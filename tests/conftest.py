"""What every test starts from: a fixed seed; torch's thread count is given back afterwards. Where there is no GPU,
Triton's kernels run in its interpreter, which must be said before anything imports triton."""

import os

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
