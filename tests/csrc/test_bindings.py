"""minillm_kernels._core called by hand: what can be seen to be wrong is an error, and never a signal."""

from __future__ import annotations

import math

import pytest
import torch

from minillm_kernels.backends import compiled

if compiled.core is None:
    pytest.skip(str(compiled.missing), allow_module_level=True)

CPU = compiled.core.cpu
N, V = 2, 9
LOGITS, GRAD = torch.randn(N, V), torch.zeros(N, V)
ROWS, OUT = compiled.rows_at(LOGITS), compiled.rows_at(GRAD)
PAIR = (ROWS, ROWS, N, V, 1.0)
# Room for every array of these rows, and for more: eleven numbers a row at most, of eight bytes.
ARRAY = torch.zeros(11 * N, dtype=torch.float64)
AT = ARRAY.data_ptr()

CALLS = {
    "row_stats": (PAIR, AT, AT, AT),
    "row_grad": (PAIR, AT, AT, AT, OUT, V, 0),
    "row_stats_grad": (PAIR, AT, AT, AT, OUT, V),
    "row_scale": (PAIR, AT),
    "row_divergence": (PAIR, 0, 0.5, AT, AT, AT),
    "row_divergence_grad": (PAIR, 0, 0.5, AT, AT, AT, OUT, V),
    "row_sample": (PAIR, AT, 0.2, 0, 1.0, False, AT, AT, AT),
}
WRONG_ROWS = {
    "no-address": (0, *ROWS[1:]),
    "dtype": (ROWS[0], 3, *ROWS[2:]),
    "negative-dtype": (ROWS[0], -1, *ROWS[2:]),
    "inner-0": (*ROWS[:2], 0, *ROWS[3:]),
    "inner-negative": (*ROWS[:2], -4, *ROWS[3:]),
}
WRONG_PAIRS = {
    **{f"student-{key}": (rows, ROWS, N, V, 1.0) for key, rows in WRONG_ROWS.items()},
    **{f"teacher-{key}": (ROWS, rows, N, V, 1.0) for key, rows in WRONG_ROWS.items()},
    **{f"N={n}": (ROWS, ROWS, n, V, 1.0) for n in (-1, 1 << 56, (1 << 63) - 1)},
    **{f"V={v}": (ROWS, ROWS, N, v, 1.0) for v in (0, -1, 1 << 60)},
    **{f"T={t}": (ROWS, ROWS, N, V, t) for t in (0.0, -1.0, 1e-39, math.nan, math.inf)},
}
# By the place of the argument behind the pair.
OTHERS = {
    "row_stats": {2: [0, AT + 1], 1: [AT + 4]},
    "row_grad": {1: [0, AT + 2], 2: [0], 3: [*WRONG_ROWS.values(), (OUT[0], 1, *OUT[2:])], 4: [V - 1, -1]},
    "row_stats_grad": {1: [0], 2: [0], 3: [*WRONG_ROWS.values(), (OUT[0], 1, *OUT[2:])], 4: [V - 1, -1]},
    "row_scale": {0: [0]},
    "row_divergence": {0: [4, -1], 3: [0], 4: [0, AT + 3]},
    "row_divergence_grad": {0: [4], 2: [0], 3: [0], 4: [0], 5: [*WRONG_ROWS.values()], 6: [V - 1]},
    "row_sample": {0: [0, AT + 4], 1: [-0.1, 1.1, math.nan], 5: [0], 6: [0], 7: [0]},
}


@pytest.fixture(autouse=True)
def fresh():
    ARRAY.zero_()


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_cannot_be(name):
    function, arguments = getattr(CPU, name), CALLS[name]
    function(1, *arguments)
    for what, pair in WRONG_PAIRS.items():
        with pytest.raises(ValueError, match=r"minillm_kernels\._core: "):
            function(1, pair, *arguments[1:])
            pytest.fail(what)
    for place, values in OTHERS[name].items():
        for value in values:
            changed = list(arguments)
            changed[1 + place] = value
            with pytest.raises(ValueError, match=r"minillm_kernels\._core: "):
                function(1, *changed)
                pytest.fail(f"argument {place} is {value}")


def test_a_divergence_and_a_teachers_sample_need_a_teacher():
    alone = (ROWS, None, N, V, 1.0)
    for name in ("row_divergence", "row_divergence_grad", "row_sample"):
        with pytest.raises(ValueError, match="has a teacher"):
            getattr(CPU, name)(1, alone, *CALLS[name][1:])


def test_memory_that_is_not_there():
    """States for 2^54 rows: no more than an exception."""
    rows = compiled.rows_at(torch.zeros(1, 1).expand(2, 1))
    with pytest.raises(MemoryError):
        CPU.row_stats(1, (rows, None, 1 << 54, 1, 1.0), 0, 0, AT)


@pytest.mark.parametrize("threads", [-(1 << 31), -1, 0, (1 << 31) - 1])
def test_any_number_of_threads(threads):
    CPU.row_stats(threads, *CALLS["row_stats"])
    assert ARRAY.isfinite().all()


def test_no_rows_need_no_memory():
    nothing = (0, 0, 1, 0, 0)
    CPU.row_stats(1, (nothing, nothing, 0, 5, 1.0), 0, 0, 0)
    CPU.row_grad(1, (nothing, nothing, 0, 5, 1.0), 0, 0, 0, nothing, 5, 0)
    CPU.row_sample(1, (nothing, None, 0, 5, 1.0), 0, 0.0, 0, 1.0, False, 0, 0, 0)
