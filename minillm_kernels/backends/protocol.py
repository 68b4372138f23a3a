"""The row operations: what each of them computes, and what a backend must have.

Legend: ... rows, V = pair.vocab_size the columns that count, V' >= V the width of the student's head; q, p softmax of
the student's and the teacher's row at pair.temperature; "per row" means the leading shape of the student.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from torch import Tensor

from ..rows import Pair


class Backend(Protocol):
    """An implementation of the row operations.

    Results per row are float32; the reference, which takes float64, returns float64 for it. Statistics, coefficients
    and values may come in either. Gradients are written to `out`, which has the student's shape and type and may be
    the student itself; without it to a new tensor. Columns from V on, rows that are not read and columns outside the
    support (-inf in one of the models) have gradient 0.
    """

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend does not run on this machine, or None."""

    @abstractmethod
    def refusal(self, x: Tensor) -> str | None:
        """Why this backend cannot take that tensor (its device, its type), or None."""

    @abstractmethod
    def row_stats(self, pair: Pair, token_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """[len(RowStats), ...]: every statistic of `rows.RowStats` per row, from one read of the pair.

        token_ids: int64 per row, the tokens whose log-probabilities are taken; without them those are 0.
        mask: bool per row; a row that is False is not read and its statistics are 0.
        """

    @abstractmethod
    def row_grad(
        self,
        pair: Pair,
        token_ids: Tensor | None,
        stats: Tensor,
        coefficients: Tensor,
        out: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """[..., V']: the gradient of sum(coefficients * differentiable statistics) in the student's logits.

        stats: what row_stats returned for the same pair and token_ids. coefficients: [len(DIFFERENTIABLE), ...]; a
        row whose coefficients are all 0 is not read. The formula is in csrc/rowmath/gradient.h.

        factor: one element that arrived for the loss, on the same device, where the host does not look: it multiplies
        all coefficients. `out` holds the gradient without it: where it is 1 a backend may leave that alone.
        """

    def row_stats_grad(
        self, pair: Pair, token_ids: Tensor | None, coefficients: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """row_stats and row_grad at once, for coefficients that are known beforehand. A row whose coefficients are all
        0 is not read: its statistics and its gradient are 0.

        Here one after the other; a backend that can keep a row pair between the two reads it once.
        """
        stats = self.row_stats(pair, token_ids, (coefficients != 0).any(0))
        return stats, self.row_grad(pair, token_ids, stats, coefficients, out)

    @abstractmethod
    def row_scale(self, x: Tensor, factor: Tensor) -> None:
        """Multiplies a gradient, in place, by a number that arrived for its loss.

        x: of any shape, contiguous. factor: one element on the same device, where the host does not look. 0 gives
        zeros, also of NaN; where it is 1 a backend may leave the memory alone.
        """

    @abstractmethod
    def row_divergence(self, pair: Pair, mask: Tensor | None, stats: Tensor, divergence: str, beta: float) -> Tensor:
        """[2, ...]: a divergence of `rows.MIXTURE_DIVERGENCES` per row, and sum_v q_v dD/dq_v, which its gradient
        needs. csrc/rowmath/divergence.h has the formulas.

        stats: what row_stats returned for the pair. beta: the weight in the mixture. mask: as in row_stats.
        """

    @abstractmethod
    def row_divergence_grad(
        self,
        pair: Pair,
        stats: Tensor,
        values: Tensor,
        scale: Tensor,
        divergence: str,
        beta: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """[..., V']: the gradient of sum(scale * divergence) in the student's logits.

        values: what row_divergence returned. scale: per row; a row whose scale is 0 is not read.
        """

    @abstractmethod
    def row_sample(
        self, pair: Pair, uniforms: Tensor, alpha: float, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A token per row from alpha p + (1 - alpha) q: (token_ids int64, log-probabilities [3, ...] under student,
        teacher and mixture, from_teacher bool). csrc/rowmath/sampling.h tells how.

        uniforms: float64 [..., 2] in [0, 1), the coin for the model and the draw of the token. pair.temperature 0
        takes the mixture's argmax at temperature 1. top_k (0 = all) and top_p (1 = all) filter each model before they
        are mixed. Without a teacher alpha is 0 and the teacher's log-probabilities are 0.
        """
