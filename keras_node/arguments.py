"""Checks of arguments that several layers and models share."""

import math
import numbers
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """Returns `value` as an `int`, also from a float such as `2.0`. Raises where it is no integer of 1 or more."""
    return _integer(name, value, least=1)


def non_negative_integer(name: str, value: Any) -> int:
    """Returns `value` as an `int`, also from a float such as `2.0`. Raises where it is no integer of 0 or more."""
    return _integer(name, value, least=0)


def _integer(name, value, least):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value != int(value) or value < least:
        raise ValueError(f"`{name}` must be an integer of {least} or more. Received: {name}={value!r}")
    return int(value)
