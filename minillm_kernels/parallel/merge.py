r"""Finished statistics of slices of a row merge into those of the row, by the chain rule of KL.

With q_i, p_i the laws of the columns that rank i holds, renormalised, and Q_i, P_i their masses under the whole row:

    ln Q_i = ln Z_i + (m_i - m)/T - ln Z
    KL(q||p) = sum_i Q_i (KL(q_i||p_i) + ln Q_i - ln P_i)      KL(p||q) = sum_i P_i (KL(p_i||q_i) + ln P_i - ln Q_i)
    H(q) = sum_i Q_i (H(q_i) - ln Q_i)                         log q(y) = log q_i(y) + ln Q_i where rank i holds y

A slice without columns has ln Z_i = -inf, hence mass 0, and whatever stands beside it does not count.

Legend: P ranks, ... rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows import RowStats

OF_STUDENT = ("student_origin", "student_logz", "student_entropy")
OF_PAIR = ("teacher_origin", "teacher_logz", "reverse_kl", "forward_kl")


def exchanged(teacher: bool, tokens: bool) -> list[str]:
    """The statistics that ranks exchange: 9 of a pair of rows with a token."""
    names = [*OF_STUDENT, *(OF_PAIR if teacher else ())]
    if tokens:
        names += ["student_logprobs", *(["teacher_logprobs"] if teacher else [])]
    return names


def merged(slices: dict[str, Tensor], temperature: float) -> RowStats:
    """The statistics of whole rows, in float64, of those that `exchanged` names, [P, ...] each; others are 0.

    A token that no rank holds has log-probability -inf.
    """
    x = {name: field.double() for name, field in slices.items()}
    zero = torch.zeros_like(x["student_logz"][0])
    m_s, ln_z_s, ln_q = shares(x["student_origin"], x["student_logz"], temperature)
    row = dict.fromkeys(RowStats._fields, zero) | {
        "student_origin": m_s,
        "student_logz": ln_z_s,
        "student_entropy": _mean(ln_q, x["student_entropy"] - ln_q),
        "student_logsumexp": m_s / temperature + ln_z_s,
    }
    logs = {"student_logprobs": ln_q}
    if "teacher_logz" in x:
        m_t, ln_z_t, ln_p = shares(x["teacher_origin"], x["teacher_logz"], temperature)
        row |= {
            "teacher_origin": m_t,
            "teacher_logz": ln_z_t,
            "reverse_kl": _mean(ln_q, x["reverse_kl"] + ln_q - ln_p),
            "forward_kl": _mean(ln_p, x["forward_kl"] + ln_p - ln_q),
            "teacher_logsumexp": m_t / temperature + ln_z_t,
        }
        logs["teacher_logprobs"] = ln_p
    row |= {name: (x[name] + ln_mass).amax(0) for name, ln_mass in logs.items() if name in x}
    return RowStats(**row)


def shares(origin: Tensor, ln_z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Origin and log-normaliser of the whole rows, and [P, ...] the logarithm of each slice's share of their mass.
    NaN where no slice has a column."""
    top = origin.amax(0)
    ln_mass = torch.where(torch.isneginf(ln_z), -math.inf, (origin - top) / temperature + ln_z)
    total = ln_mass.logsumexp(0)
    total = total.masked_fill(torch.isneginf(total), math.nan)
    return top, total, ln_mass - total


def _mean(ln_weight: Tensor, x: Tensor) -> Tensor:
    """sum of weight * x over the slices; 0 times anything is 0."""
    weight = ln_weight.exp()
    return torch.where(weight == 0, 0, weight * x).sum(0)
