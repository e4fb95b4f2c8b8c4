"""Checks of numbers that a user passes as options."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """Returns `value` as an integer of 1 or more. `3.0` is accepted, `True` is not."""
    return _integer(name, value, 1, "a positive integer")


def non_negative_integer(name: str, value: Any) -> int:
    """Returns `value` as an integer of 0 or more. `3.0` is accepted, `True` is not."""
    return _integer(name, value, 0, "an integer, 0 or more")


def number(name: str, value: Any) -> float:
    """Returns `value` as a Python float, and refuses NaN."""
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not usable or math.isnan(value):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Returns `value` as a positive Python float, which may be infinite."""
    if not number(name, value) > 0:
        raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")
    return float(value)


def tolerance(name: str, value: Any) -> float | tuple[float, ...]:
    """Returns `value` as a positive number, or as a tuple of positive numbers if it is a list or an array of them."""
    if not isinstance(value, Iterable) or isinstance(value, str) or getattr(value, "ndim", 1) == 0:
        return positive_number(name, value)
    values = tuple(positive_number(name, each) for each in value)
    if not values:
        raise ValueError(f"`{name}` must be a positive number or a list of them. Received: {name}={value!r}")
    return values


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of the choices. The error suggests the nearest one."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}` must be one of {', '.join(choices)}.{hint} Received: {name}={value!r}")


def _integer(name: str, value: Any, least: int, what: str) -> int:
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not usable or not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"`{name}` must be {what}. Received: {name}={value!r}")
    return int(value)
