"""One thread for models this small."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(reproducible):
    torch.set_num_threads(1)
