"""How rows are divided over blocks (csrc/cuda/launch.h): what the last wave and the merges of parts cost, computed."""

from __future__ import annotations

import host_build
import pytest

pytestmark = pytest.mark.skipif(host_build.missing() is not None, reason=str(host_build.missing()))

# Blocks that a card runs at once, two a multiprocessor: A100, H100, B200.
AT_ONCE = (216, 264, 296)
# What a part costs beside its columns, as columns: 0.5 microseconds at the pace of one of an H100's 264 blocks, which
# share 3 TB/s of bf16 pairs.
OF_A_PART = 1400


def share(N: int, V: int, parts: int, at_once: int) -> float:
    """Of the time that no block would waste: all parts of a wave take the same time, the last wave is not full."""
    waves = -(-N * parts // at_once)
    return N * V / at_once / (waves * (V / parts + OF_A_PART))


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize(("V", "least", "usual"), [(151936, 0.87, 0.92), (128256, 0.87, 0.92), (50257, 0.84, 0.89)])
def test_the_last_wave_is_short(host_cuda_kernels, V, least, usual, at_once):
    """Where a block a row is worst, just above a number of full waves."""
    rows = range(1060, 1300, 4)
    ours = [share(N, V, host_cuda_kernels.splits(N, V), at_once) for N in rows]
    alone = [share(N, V, 1, at_once) for N in rows]
    assert min(ours) > least and sum(ours) > usual * len(ours)
    assert min(alone) < 0.83 and sum(ours) > sum(alone)


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("V", [32000, 50257, 128256, 151936])
def test_parts_pay_on_average(host_cuda_kernels, V, at_once):
    """Over all numbers of rows that are at least as many as an H100's blocks at once, against a block a row."""
    rows = range(1024, 8448, 8)
    ours = sum(share(N, V, host_cuda_kernels.splits(N, V), at_once) for N in rows)
    assert ours >= sum(share(N, V, 1, at_once) for N in rows)


def test_every_row_is_read_whole_and_few_rows_by_many_blocks(host_cuda_kernels):
    splits = host_cuda_kernels.splits
    assert [splits(N, 1) for N in (0, 1, 5000)] == [1, 1, 1]
    assert splits(1, 151936) == 19 and splits(64, 151936) == 16 and splits(8192, 151936) == 1
