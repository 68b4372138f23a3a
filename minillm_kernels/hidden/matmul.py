"""Matmuls of a vocabulary head, by the faster of the libraries that torch carries.

For fp32 on x86 CPUs torch calls MKL, which keeps to narrow registers on AMD; oneDNN, which torch.compile calls for
the same product, does not, and is as exact (benchmarks/test_linear.py::test_head times both). It has no `out=`; the
product of gradient and hidden states, which accumulates into the weight's gradient, is left to MKL, faster there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ADDS_TO_FP32 = hasattr(torch.ops.aten.addmm, "dtype_out")  # on CUDA, from torch 2.8 on


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x weight^T [n, m] of x [n, k] and weight [m, k], without a gradient; in `out`, or where the library takes none,
    in memory of its own."""
    if _takes_onednn(x) and _takes_onednn(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t(), out=out) if out is not None else x @ weight.t()


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x y, of x [m, n] and y [n, k] in one type and total [m, k] in that type or a wider one.

    A GPU multiplies 16-bit matrices and adds to fp32 in one matmul: 8 bytes of traffic an element of `total` where
    a product of its own, rounded to 16 bits, and its addition take 12. float16 may not hold that product.
    """
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    elif x.is_cuda and _ADDS_TO_FP32:
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    elif x.is_cuda and x.dtype == torch.bfloat16:
        total += x @ y
    else:
        total.addmm_(x.to(total.dtype), y.to(total.dtype))


def _takes_onednn(x: Tensor) -> bool:
    here = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    here = here and not torch.is_autocast_enabled("cpu")  # torch's own matmul is what autocast knows
    return here and x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and _HAS_ONEDNN
