"""The examples of trainers that split the vocabulary over ranks do what one process does."""

import pytest
import vocab_parallel_cases as cases
from worlds import World


@pytest.fixture(scope="module")
def two():
    with World(2, "vocab_parallel_cases") as world:
        yield world


def test_megatron(two):
    two.run(cases.megatron_trains_what_one_process_trains)


def test_verl(two):
    two.run(cases.verl_updates_what_one_process_updates)
    two.run(cases.verl_learns)
