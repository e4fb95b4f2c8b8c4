"""Checks of numbers that a user passes as options."""

import math
import numbers
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """`value` as an integer of at least 1; `3.0` counts as one, `True` does not."""
    return _integer(name, value, 1, "a positive integer")


def non_negative_integer(name: str, value: Any) -> int:
    """`value` as an integer of at least 0; `3.0` counts as one, `True` does not."""
    return _integer(name, value, 0, "an integer, 0 or more")


def number(name: str, value: Any) -> float:
    """`value` as a Python float that is not NaN."""
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not usable or math.isnan(value):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """`value` as a positive Python float; it may be infinite."""
    if not number(name, value) > 0:
        raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")
    return float(value)


def _integer(name, value, least, what):
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not usable or not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")
    return int(value)
