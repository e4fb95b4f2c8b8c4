"""Initial value problems with solutions in closed form."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Problem(NamedTuple):
    """`dy/dt = field(t, y)`, `y(0) = y0`, up to `t1`.

    Attributes:
        name: what the tests call it.
        field: `f(t, y)` for a state `(batch, 1)`; `t` is a scalar or `(batch, 1)`.
        y0: the state at time 0, float64.
        t1: a time at which the solution is still of the size of `y0`.
        solution: the states at times `(T,)`, `(T, batch, 1)`.
    """

    name: str
    field: Callable
    y0: np.ndarray
    t1: float
    solution: Callable


def _at(formula):
    """Gives every time two axes, against which a state broadcasts."""
    return lambda t: formula(np.asarray(t, np.float64)[..., None, None])


_START = np.array([[0.5], [1.0], [1.5]])

# Nonlinear, and the same at all times.
LOGISTIC = Problem(
    name="logistic",
    field=lambda t, y: y * (2 - y),
    y0=_START,
    t1=2.0,
    solution=_at(lambda t: 2 / (1 + (2 / _START - 1) * np.exp(-2 * t))),
)

# Linear, and driven from outside.
DRIVEN = Problem(
    name="driven",
    field=lambda t, y: tf.cos(3 * t) - y,
    y0=_START,
    t1=3.0,
    solution=_at(lambda t: (np.cos(3 * t) + 3 * np.sin(3 * t)) / 10 + (_START - 0.1) * np.exp(-t)),
)

PROBLEMS = (LOGISTIC, DRIVEN)
