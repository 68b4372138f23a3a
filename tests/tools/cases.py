"""Rows of logits that break kernels: sizes around every boundary, types, offsets, and columns that are not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", torch.float64: "fp64"}

# 1, 2: nothing to reduce. 15, 16, 17: around the widest register (and 3, 4, 5, 7, 8, 9 around the others).
# 2047, 2048, 2049: around a tile. 4111: two tiles and an odd rest. 50257, 151936: GPT-2's and Qwen's heads.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 2047, 2048, 2049, 4111, 50257, 151936)

# (): a single row. (0,), (2, 0): no rows. 1, 3: rows split over their columns. 70: one work unit a row.
LEADING = ((), (0,), (2, 0), (1,), (3,), (2, 3), (2, 1, 2), (70,))


@dataclass(frozen=True)
class Case:
    V: int = 4111
    leading: tuple[int, ...] = (3,)
    student: torch.dtype = FP32
    teacher: torch.dtype = FP32
    teacher_V: int | None = None
    vocab_size: int | None = None
    temperature: float = 1.0
    pattern: str = "finite"
    offset: float = 0.0
    distance: float = 3.0  # of the teacher's logits from the student's, which spread by 3

    def __str__(self) -> str:
        dtypes = NAMES[self.student] + ("" if self.student == self.teacher else f"/{NAMES[self.teacher]}")
        heads = "" if self.teacher_V is None else f"/{self.teacher_V}"
        text = f"{'x'.join(map(str, self.leading))}x{self.V}{heads}-{dtypes}-T{self.temperature:g}-{self.pattern}"
        text += "" if self.vocab_size is None else f"-first{self.vocab_size}"
        text += "" if self.distance == 3.0 else f"-distance{self.distance:g}"
        return text + ("" if self.offset == 0.0 else f"-offset{self.offset:g}")

    @property
    def columns(self) -> int:
        """How many columns count."""
        return self.vocab_size or min(self.V, self.teacher_V or self.V)

    def logits(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.V + len(self.leading))
        width = max(self.V, self.teacher_V or 0)
        s = 3 * torch.randn(*self.leading, width, generator=generator)
        t = s + self.distance * torch.randn(*self.leading, width, generator=generator)
        s = (s + self.offset)[..., : self.V].to(self.student)
        t = (t - self.offset)[..., : self.teacher_V or self.V].to(self.teacher)
        s, t = s.contiguous(), t.contiguous()
        PATTERNS[self.pattern](s, t)
        return s, t

    def token_ids(self) -> Tensor:
        """Some of them the first and the last column."""
        generator = torch.Generator().manual_seed(self.V)
        ids = torch.randint(self.columns, self.leading, generator=generator)
        flat = ids.view(-1)
        flat[1:2], flat[2:3] = 0, self.columns - 1
        return ids

    def coefficients(self, fields: int) -> Tensor:
        """Upstream gradients, none of them 1."""
        return torch.randn(fields, *self.leading, generator=torch.Generator().manual_seed(5)).double()


def _some(x: Tensor, share: float) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-1] + int(100 * share))) < share


def _student_inf(s: Tensor, t: Tensor) -> None:
    s[_some(s, 0.3)] = -torch.inf


def _teacher_inf(s: Tensor, t: Tensor) -> None:
    t[_some(t, 0.3)] = -torch.inf


def _both_inf(s: Tensor, t: Tensor) -> None:
    s[_some(s, 0.3)] = -torch.inf
    t[_some(t, 0.4)] = -torch.inf


def _tiles_inf(s: Tensor, t: Tensor) -> None:
    """The first tile gone in one model, the second in the other."""
    s[..., :2048] = -torch.inf
    t[..., 2048:4096] = -torch.inf


def _one_left(s: Tensor, t: Tensor) -> None:
    """Disjoint but for column 3."""
    s[..., 4:] = -torch.inf
    t[..., :3] = -torch.inf


def _row_empty(s: Tensor, t: Tensor) -> None:
    s[1] = -torch.inf


def _disjoint(s: Tensor, t: Tensor) -> None:
    """No column finite in both models in row 0, though each model has some."""
    s[0, ::2] = -torch.inf
    t[0, 1::2] = -torch.inf


def _lowest(s: Tensor, t: Tensor) -> None:
    """Masked the other way: the lowest finite number, in both models, in single columns and in a whole tile."""
    out = _some(s, 0.3)
    out[..., 2048:4096] = True
    s[out], t[out] = torch.finfo(s.dtype).min, torch.finfo(t.dtype).min


def _equal(s: Tensor, t: Tensor) -> None:
    t.copy_(s[..., : t.shape[-1]])


def _one_hot(s: Tensor, t: Tensor) -> None:
    """So peaked that all other probabilities underflow, on different columns."""
    s[..., 1] += 500
    t[..., 2] += 500


def _peaks_outside(s: Tensor, t: Tensor) -> None:
    """Each model's largest logit, far above the rest, where the other model has -inf: at the start, in the middle."""
    for column, (peaked, other) in {0: (s, t), 1: (t, s), 2500: (t, s), 2501: (s, t)}.items():
        if column < peaked.shape[-1]:
            peaked[..., column], other[..., column] = 500, -torch.inf


PATTERNS = {
    "finite": lambda s, t: None,
    "student_inf": _student_inf,
    "teacher_inf": _teacher_inf,
    "both_inf": _both_inf,
    "tiles_inf": _tiles_inf,
    "one_left": _one_left,
    "row_empty": _row_empty,
    "disjoint": _disjoint,
    "lowest": _lowest,
    "equal": _equal,
    "one_hot": _one_hot,
    "peaks_outside": _peaks_outside,
}

DTYPE_PAIRS = [(s, t) for s in (FP32, BF16, FP16) for t in (FP32, BF16, FP16)]

SHAPES = [
    *(Case(V, (2 if V > 10**5 else 3,)) for V in WIDTHS),
    *(Case(V, (2,), BF16, BF16) for V in WIDTHS if V > 8),
    *(Case(4111, leading) for leading in LEADING),
    *(Case(517, leading, BF16, FP16) for leading in LEADING),
]
TYPES = [Case(2065, (4,), s, t) for s, t in DTYPE_PAIRS]
TEMPERATURES = [Case(temperature=T) for T in (0.3, 0.7, 2.0, 10.0)] + [Case(student=BF16, temperature=0.7)]
HEADS = [
    Case(4111, teacher_V=4200),
    Case(4200, teacher_V=4111, student=BF16),
    Case(4111, teacher_V=4200, vocab_size=2000),
    Case(4111, teacher_V=2100, vocab_size=2048, student=FP16, teacher=BF16),
    Case(30, vocab_size=1),
    Case(4111, (70,), vocab_size=2049),
]
NOT_FINITE = [Case(6161, (2, 2) if name not in ("row_empty", "disjoint") else (3,), pattern=name) for name in PATTERNS]
NOT_FINITE += [Case(2063, (3,), BF16, FP16, pattern=name) for name in PATTERNS]
# In one work unit a row's tiles follow each other: what one tile leaves behind must not spoil the next.
NOT_FINITE += [Case(6161, (64,), pattern=name) for name in ("both_inf", "tiles_inf", "lowest", "peaks_outside")]
OFFSETS = [Case(50257, (2,), offset=x) for x in (1000.0, -1e4)] + [Case(2065, (2,), BF16, offset=-1000.0)]

ALL = list(dict.fromkeys([*SHAPES, *TYPES, *TEMPERATURES, *HEADS, *NOT_FINITE, *OFFSETS]))

# For Triton's interpreter, which takes milliseconds for each program and tile: one case of each kind, few rows.
INTERPRETED = {
    *(Case(V, (3,)) for V in (1, 17, 4111)),
    *(Case(V, (2,), BF16, BF16) for V in (9, 151936)),
    *(Case(4111, leading) for leading in ((), (0,))),
    *(c for c in TYPES if FP32 in (c.student, c.teacher) or c.student != c.teacher),
    Case(temperature=0.3),
    *HEADS[:4],
    *(c for c in NOT_FINITE if c.V == 2063),
    *(c for c in NOT_FINITE if c.leading == (2, 2) and c.pattern in ("tiles_inf", "peaks_outside")),
    *(c for c in OFFSETS if c.V == 2065),
}
# Each divergence is a kernel of its own there; and of its inputs, where columns are missing or models part.
INTERPRETED_LAWS = {("jsd", 0.1), ("skew_forward_kl", 0.1), ("skew_reverse_kl", 0.1), ("tvd", 0.5)}
INTERPRETED_MIXTURES = {
    *(Case(2065, (4,), BF16, FP16), Case(4111, teacher_V=4200, vocab_size=2000)),
    *(c for c in NOT_FINITE if c.V == 2063 and c.pattern in ("both_inf", "one_hot", "lowest")),
}
# What it leaves out: hundreds of rows, or hundreds of calls that differ outside the kernels. And bits that depend on
# where a row starts modulo 16 bytes, since its tiles start there: test_triton.py compares such rows by value.
NOT_INTERPRETED = {
    *("test_reductions", "test_batchmean_of_all_rows", "test_reductions_are_those_of_the_reverse_kl"),
    *("test_ties_at_the_top_k_cut_are_kept", "test_top_p_keeps_while_the_mass_strictly_before_is_below_it"),
    *("test_generator", "test_precision_of_long_rows", "test_temperature_zero_is_the_argmax_of_the_mixture"),
    *("test_bits_do_not_depend_on_the_other_rows", "test_a_view_is_its_copy"),
    *("test_in_place_through_a_view_touches_nothing_else", "test_inverse_cdf"),
}
INTERPRETED_PARAMETERS = {"setting": ("plain", "all"), "pattern": ("both_inf", "one_left"), "value": (torch.nan,)}
