"""What every test starts from: a fixed seed; torch's thread count is given back afterwards."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
