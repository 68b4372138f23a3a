"""The examples' folder comes first on the path, as when a user runs one of them as a script."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True)
def one_thread(reproducible):
    torch.set_num_threads(1)
