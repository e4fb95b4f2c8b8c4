"""Solvers: Butcher tableaus (data), one Runge-Kutta step, and the object that selects a method and its steps."""

from typing import Any

import keras

from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.tableaus import TABLEAUS

# The number of steps between two times for a method without an error estimate that is given by its name only.
DEFAULT_NUM_STEPS = 10


def get(identifier: RungeKutta | str | dict[str, Any]) -> RungeKutta:
    """Returns a solver from a `RungeKutta`, the name of a method, or a config.

    Raises:
        ValueError: for an unknown method.
        TypeError: for an `identifier` of another type.
    """
    if isinstance(identifier, RungeKutta):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str):
        tableau = TABLEAUS.get(identifier)
        if tableau is not None and not tableau.embedded:
            return RungeKutta(identifier, num_steps=DEFAULT_NUM_STEPS)
        return RungeKutta(identifier)
    raise TypeError(
        "`solver` must be the name of a method or a `keras_node.RungeKutta`. "
        f"Received: solver={identifier!r} (of type {type(identifier).__name__})"
    )
