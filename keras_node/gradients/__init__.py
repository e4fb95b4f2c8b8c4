"""Gradients: one file for each way to differentiate a solve. You call a gradient with a `Problem`."""

from typing import Any, TypeAlias

import keras

from keras_node.arguments import one_of
from keras_node.gradients.backsolve import BacksolveAdjoint
from keras_node.gradients.checkpointed import CheckpointedAdjoint
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.reversible import ReversibleAdjoint
from keras_node.solvers.runge_kutta import RungeKutta

Gradient: TypeAlias = BacksolveAdjoint | CheckpointedAdjoint | DirectGradient | ReversibleAdjoint

GRADIENTS: dict[str, type[Gradient]] = {
    "backsolve": BacksolveAdjoint,
    "checkpointed": CheckpointedAdjoint,
    "direct": DirectGradient,
    "reversible": ReversibleAdjoint,
}


def default(solver: RungeKutta) -> Gradient:
    """The gradient of a solve for which none was chosen."""
    if solver.tableau.symplectic:
        return ReversibleAdjoint()
    return CheckpointedAdjoint() if solver.tableau.implicit else BacksolveAdjoint()


def check(gradient: Gradient, solver: RungeKutta) -> None:
    """Raises an error for a gradient that does not fit the solver."""
    backward = gradient.solver if isinstance(gradient, BacksolveAdjoint) else None
    if isinstance(gradient, BacksolveAdjoint) and (backward or solver).tableau.symplectic:
        raise ValueError(
            'gradient="backsolve" solves for the state together with its adjoint, and a symplectic method cannot: it '
            "needs positions and velocities. Leave out `gradient` to get the exact gradient of the symplectic method, "
            "or pass `BacksolveAdjoint(solver=...)` with another method. "
            f"Received: gradient={gradient!r} with the symplectic method {(backward or solver).method!r}"
        )
    if isinstance(gradient, ReversibleAdjoint) and solver.tableau.implicit:
        raise ValueError(
            'gradient="reversible" makes its steps of those of an explicit method. Leave out `gradient` to get the '
            "exact gradient of the implicit method. "
            f"Received: gradient={gradient!r} with the implicit method {solver.method!r}"
        )
    implicit = next((s for s in (backward, solver) if s is not None and s.tableau.implicit), None)
    if isinstance(gradient, BacksolveAdjoint) and implicit is not None:
        raise ValueError(
            'gradient="backsolve" solves the field backward in time. There, what dies out quickly in a stiff problem '
            "grows just as quickly, so the path is lost within a few steps, and no solver can help. Leave out "
            '`gradient` to get the exact gradient of the implicit method, or pass gradient="checkpointed". '
            f"Received: gradient={gradient!r} with the implicit method {implicit.method!r}"
        )


def get(identifier: Gradient | str | dict[str, Any] | None) -> Gradient | None:
    """Returns a gradient from an object, a name or a config, and `None` unchanged.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an `identifier` of another type.
    """
    if identifier is None:
        return None
    if isinstance(identifier, Gradient):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str):
        return GRADIENTS[one_of("gradient", identifier, GRADIENTS)]()
    raise TypeError(
        f"`gradient` must be one of {', '.join(GRADIENTS)}, or an object such as `keras_node.BacksolveAdjoint()`. "
        f"Received: gradient={identifier!r} (of type {type(identifier).__name__})"
    )
