"""Bytes that the row kernels load and store, counted by Triton's interpreter: TRITON_INTERPRET=1 python -m
benchmarks.gpu_static.traffic prints JSON. Every access of every program counts, workspace and statistics included."""

from __future__ import annotations

import json

import numpy as np
from triton.runtime.interpreter import interpreter_builder

from .triton_kernels import N, V, row_kernels


class Traffic:
    def __init__(self) -> None:
        self.bytes = 0

    def count(self, pointers, mask) -> None:
        self.bytes += int(np.count_nonzero(mask.data)) * (pointers.get_element_ty().primitive_bitwidth // 8)


def main() -> None:
    traffic = Traffic()
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def counted_load(pointers, mask, *rest):
        traffic.count(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        traffic.count(pointers, mask)
        return store(pointers, value, mask, *rest)

    interpreter_builder.create_masked_load = counted_load
    interpreter_builder.create_masked_store = counted_store
    found = []
    for kernel in row_kernels():
        traffic.bytes = 0
        with np.errstate(all="ignore"):
            kernel.launch()
        least = V * (kernel.read + kernel.written) + kernel.extra * kernel.read
        entry = {"kernel": kernel.label, "bytes_per_row": traffic.bytes // N, "least": least}
        found.append({**entry, "of_minimum": round(traffic.bytes / N / least, 4)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
