"""The head's matmul: equal to float64 whatever library takes it, as exact as torch.mm; torch.mm where none does."""

import pytest
import torch

from minillm_kernels.hidden import matmul


@pytest.mark.parametrize("shape", [(1, 5, 3), (8, 1001, 24), (37, 129, 64)])  # odd sizes: no whole registers
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_float64(shape, transposed):
    n, m, k = shape
    x = torch.randn(n, k)
    weight = torch.randn(k, m).t() if transposed else torch.randn(m + 2, k)[:m]
    truth = x.double() @ weight.double().t()
    for out in (None, torch.empty(n, m)):
        error = (matmul.linear(x, weight, out) - truth).abs().max()
        assert error <= 4 * (torch.mm(x, weight.t()) - truth).abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_with_torch(dtype):
    x, weight, out = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.empty(3, 5, dtype=dtype)
    assert matmul.linear(x, weight, out) is out
    assert torch.equal(out, x @ weight.t())


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(matmul, "_HAS_ONEDNN", False)
    x, weight, out = torch.randn(3, 4), torch.randn(5, 4), torch.empty(3, 5)
    assert matmul.linear(x, weight, out) is out
    assert torch.equal(matmul.linear(x, weight), out)


def test_no_rows():
    assert matmul.linear(torch.randn(0, 4), torch.randn(5, 4)).shape == (0, 5)
