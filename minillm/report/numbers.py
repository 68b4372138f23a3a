"""Numbers as text; one that is undefined (NaN) is a question mark."""

import math

from minillm.evaluation.means import Mean


def number(value: float, digits: int, sign: bool = False) -> str:
    return "?" if math.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def plus_minus(value: float, error: float, digits: int = 3, sign: bool = False) -> str:
    return f"{number(value, digits, sign)} ± {number(error, digits)}"


def mean(value: Mean, digits: int = 3) -> str:
    """Mean ± standard error."""
    return plus_minus(value.mean, value.standard_error, digits)
