"""Slices of rows, without processes: their statistics merge into the whole rows', and from these each slice has its
part of the gradient."""

import math

import pytest
import torch

from minillm_kernels.backends import choose
from minillm_kernels.parallel.merge import exchanged, merged
from minillm_kernels.parallel.split import stats_of_slice
from minillm_kernels.rows import DIFFERENTIABLE, Pair, RowStats

N, V, T = 6, 40, 1.3
SLICES = (slice(0, 17), slice(17, 18), slice(18, 40))


def rows(backend, shift=0.0):
    dtype = torch.float64 if backend == "reference" else torch.float32
    z_s, z_t = torch.randn(N, V, dtype=dtype) + shift, torch.randn(N, V, dtype=dtype) - shift
    z_s[1, 3], z_t[2, 30], z_s[3, 17] = -math.inf, -math.inf, -math.inf  # the last is a slice without support
    z_s[4, 17] = math.nan  # and this one all NaN
    return z_s, z_t


def tolerance(backend):
    return {"rtol": 1e-12, "atol": 1e-12} if backend == "reference" else {"rtol": 3e-6, "atol": 3e-6}


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_statistics_of_slices_merge(backend, shift):
    z_s, z_t = rows(backend, shift)
    here = choose.BACKENDS[backend]
    whole = here.row_stats(Pair(z_s, z_t, T, V), None, None)
    parts = [stats_of_slice(here, Pair(z_s[:, c], z_t[:, c], T, c.stop - c.start), None, None) for c in SLICES]
    names = exchanged(teacher=True, tokens=False)
    slices = {name: torch.stack([getattr(RowStats(*part), name) for part in parts]) for name in names}
    row = torch.stack(merged(slices, T)).to(whole.dtype)
    origins = [RowStats._fields.index(f"{model}_origin") for model in ("student", "teacher")]
    origins += [RowStats._fields.index(f"{model}_logz") for model in ("student", "teacher")]
    others = [i for i in range(len(row)) if i not in origins]  # backends do not measure from the same origins
    torch.testing.assert_close(row[others], whole[others], equal_nan=True, **tolerance(backend))
    assert row[:, 3].isfinite().all() and RowStats(*row).reverse_kl[4].isnan()


def test_a_slice_has_its_part_of_the_gradient(backend):
    """Measured from the whole rows' origins, which are not the slice's own maxima."""
    z_s, z_t = (x[:4] for x in rows(backend))
    z_s[:, 0] += 9  # the maxima are in the first slice
    z_t[:, 1] += 9
    here, ids, coefficients = choose.BACKENDS[backend], torch.tensor([2, 5, 16, 0]), torch.randn(5, 4, dtype=z_s.dtype)
    pair = Pair(z_s, z_t, T, V)
    stats = here.row_stats(pair, ids, None)
    grad = here.row_grad(pair, ids, stats, coefficients)
    elsewhere = coefficients.clone()  # no token in the last slice
    elsewhere[DIFFERENTIABLE.index("student_logsumexp")] -= elsewhere[DIFFERENTIABLE.index("student_logprobs")]
    elsewhere[DIFFERENTIABLE.index("student_logprobs")] = 0
    last = SLICES[-1]
    part = Pair(z_s[:, last], z_t[:, last], T, last.stop - last.start)
    torch.testing.assert_close(here.row_grad(part, None, stats, elsewhere), grad[:, last], **tolerance(backend))
    values = here.row_divergence(pair, None, stats, "jsd", 0.5)
    summed = sum(here.row_divergence(Pair(z_s[:, c], z_t[:, c], T, c.stop - c.start), None, stats, "jsd", 0.5)
                 for c in SLICES)  # fmt: skip
    torch.testing.assert_close(summed, values, **tolerance(backend))
    scale = torch.ones(4, dtype=z_s.dtype)
    whole = here.row_divergence_grad(pair, stats, values, scale, "jsd", 0.5)
    mine = here.row_divergence_grad(part, stats, values, scale, "jsd", 0.5)
    torch.testing.assert_close(mine, whole[:, last], **tolerance(backend))
