"""The compiled core (csrc/python): addresses, sizes and strides in. What can be seen of them is checked
(checks.h), and on a CPU what the token ids and uniforms are."""

from collections.abc import Callable

RowsAt = tuple[int, int, int, int, int]  # address, dtype (0 fp32, 1 bf16, 2 fp16), inner, outer_stride, inner_stride
PairAt = tuple[RowsAt, RowsAt | None, int, int, float]  # student, teacher, N, V, temperature
# How an operation runs. On a CPU: threads. On CUDA: what gives the address of some bytes of device memory, the stream.
How = int | tuple[Callable[[int], int], int]

class Operations:
    """A submodule. Other numbers are addresses of per-row tensors, 0 for none."""

    def row_stats(self, how: How, pair: PairAt, mask: int, token_ids: int, stats: int, /) -> None: ...
    def row_grad(
        self,
        how: How,
        pair: PairAt,
        token_ids: int,
        stats: int,
        coefficients: int,
        grad: RowsAt,
        width: int,
        factor: int,
        /,
    ) -> None: ...
    def row_stats_grad(
        self, how: How, pair: PairAt, token_ids: int, coefficients: int, stats: int, grad: RowsAt, width: int, /
    ) -> None: ...
    def row_scale(self, how: How, pair: PairAt, factor: int, /) -> None: ...
    def row_divergence(
        self, how: How, pair: PairAt, divergence: int, beta: float, mask: int, stats: int, out: int, /
    ) -> None: ...
    def row_divergence_grad(
        self,
        how: How,
        pair: PairAt,
        divergence: int,
        beta: float,
        stats: int,
        values: int,
        scale: int,
        grad: RowsAt,
        width: int,
        /,
    ) -> None: ...
    def row_sample(
        self,
        how: How,
        pair: PairAt,
        uniforms: int,
        alpha: float,
        top_k: int,
        top_p: float,
        greedy: bool,
        token_ids: int,
        logprobs: int,
        from_teacher: int,
        /,
    ) -> None: ...

    # Of CUDA alone.
    def holds_rows(self, n_rows: int, vocab_size: int, dtype: int, /) -> bool: ...

class Pages:
    """Memory that waits for the next result when this one is freed (csrc/cpu/pages.h)."""

    def __init__(self, bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class CpuOperations(Operations):
    TILE: int
    Pages: type[Pages]
    def advise_huge_pages(self, address: int, bytes: int, /) -> None: ...
    def instruction_set(self) -> str: ...
    def use_instruction_set(self, name: str, /) -> bool: ...

class CudaOperations(Operations):
    def versions(self) -> tuple[int, int]: ...

cpu: CpuOperations
cuda: CudaOperations  # there where CUDA_ARCHITECTURES is not ""
CUDA_ARCHITECTURES: str
STATISTICS: tuple[str, ...]
COEFFICIENTS: tuple[str, ...]
DIVERGENCES: tuple[str, ...]
