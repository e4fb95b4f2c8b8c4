"""What `odeint` checks before it solves. Every message says what arrived and what to do."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_node.events import Event
from keras_node.gradients import BacksolveAdjoint, Gradient, ReversibleAdjoint
from keras_node.solvers.rows import Rows
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.trees import Nest

# An implicit method with more numbers than this in a sample warns.
_LARGE = 256


def check_jacobian(jacobian: Any, solver: RungeKutta) -> None:
    """Checks that a Jacobian can be called, and that the method needs one."""
    if jacobian is not None and not callable(jacobian):
        raise TypeError(
            "`jacobian` must be a callable of `(y)`, `(t, y)` or `(t, y, args)`. "
            f"Received: jacobian={jacobian!r} (of type {type(jacobian).__name__})"
        )
    if jacobian is not None and not solver.tableau.implicit:
        raise ValueError(
            "Only an implicit method needs a Jacobian: leave out `jacobian`, or pass a method such as "
            f'solver="esdirk43". Received: jacobian={jacobian!r} with solver={solver!r}'
        )


def check_events(events: Sequence[Event], solver: RungeKutta, gradient: Gradient) -> None:
    """Checks that the solver and the gradient can stop at events."""
    if events and solver.tableau.symplectic:
        raise ValueError(
            "A symplectic method has no dense output, in which events could be found: use another method, such as "
            f'solver="tsit5". Received: {len(events)} event(s) with solver={solver!r}'
        )
    if events and isinstance(gradient, ReversibleAdjoint):
        raise ValueError(
            'A reversible solve cannot stop at events: use gradient="checkpointed", which is exact too. '
            f"Received: {len(events)} event(s) with gradient={gradient!r}"
        )


def checked_times(ts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Returns the times, and if their values are not known yet, whether they are finite and monotonic."""
    if ts.shape.rank not in (1, 2):
        received = "ts of unknown rank" if ts.shape.rank is None else f"ts.shape={tuple(ts.shape)}"
        raise ValueError(f"`ts` must be of shape (T,) or (T, batch). Received: {received}")
    if ts.shape[0] is not None and ts.shape[0] < 2:
        raise ValueError(
            f"`ts` must hold the initial time and one more time at least. Received: ts.shape={tuple(ts.shape)}"
        )
    values = tf.get_static_value(ts)
    if values is None:
        valid = tf.reduce_all(tf.math.is_finite(ts), 0)
        if ts.shape[0] != 2:  # two times are always monotonic
            valid &= tf.reduce_all(ts[1:] >= ts[:-1], 0) | tf.reduce_all(ts[1:] <= ts[:-1], 0)
        # A solve over times that are not monotonic would have some result. Solve over no time, and mark the result.
        return tf.where(valid, ts, tf.zeros_like(ts)), valid
    steps = np.diff(values, axis=0)
    valid = (np.all(steps >= 0, axis=0) | np.all(steps <= 0, axis=0)) & np.all(np.isfinite(values), axis=0)
    if not np.all(valid):
        sample = "" if values.ndim == 1 else f" for sample {np.argmin(valid)}"
        received = values if values.ndim == 1 else values[:, np.argmin(valid)]
        raise ValueError(
            "`ts` must be finite and monotonic, all increasing or all decreasing. "
            f"Received: ts={received.tolist()}{sample}"
        )
    return ts, None


def check_batch(y0: Nest, ts: tf.Tensor, solver: RungeKutta, hybrid: bool) -> None:
    """Checks that every leaf of the state has the same batch axis, if samples have their own times.

    They have with events or jumps (`hybrid`) too.
    """
    if ts.shape.rank == 1 and not solver.per_sample and not hybrid:
        return
    why = "`per_sample=True`" if solver.per_sample else f"`ts` of shape {tuple(ts.shape)}"
    why = "events or jumps" if hybrid else why
    batch = ts.shape[1] if ts.shape.rank == 2 else None
    for leaf in tf.nest.flatten(y0):
        if leaf.shape.rank == 0:
            raise ValueError(f"With {why} every tensor of the state must have a batch axis. Received: a scalar in y0")
        if None not in (batch, leaf.shape[0]) and leaf.shape[0] != batch:
            raise ValueError(
                f"With {why} the first axis of the state must be the batch. Received: y0 of shape {tuple(leaf.shape)}"
                f" for a batch of {batch}"
            )
        batch = leaf.shape[0] if batch is None else batch


def check_tolerances(y0: Nest, solver: RungeKutta, gradient: Gradient) -> None:
    """Checks that every tensor of the state has one entry for each tolerance on its last axis."""
    solvers_used = [solver]
    if isinstance(gradient, BacksolveAdjoint) and gradient.solver is not None:
        solvers_used.append(gradient.solver)
    for name, value in ((name, getattr(s, name)) for s in solvers_used for name in ("rtol", "atol")):
        if not isinstance(value, tuple):
            continue
        for leaf in tf.nest.flatten(y0):
            if leaf.shape[-1:] != [len(value)]:
                raise ValueError(
                    f"`{name}` must be a number, or one number for each entry on the last axis of every tensor of the "
                    f"state. Received: {name}={value} for a state of shape {tuple(leaf.shape)}"
                )
        if isinstance(gradient, BacksolveAdjoint) and gradient.norm == "full":
            raise ValueError(
                f'With norm="full" the error norm contains the gradients of weights, so `{name}` must be one number. '
                f"Received: {name}={value} with gradient={gradient!r}"
            )


def check_size(y0: Nest, ts: tf.Tensor, solver: RungeKutta) -> None:
    """Warns if an implicit method must invert large matrices."""
    if not solver.tableau.implicit:
        return
    size = sum(Rows(y0, has_batch=solver.per_sample or ts.shape.rank == 2).sizes)
    if size > _LARGE:
        warnings.warn(
            f"The implicit method {solver.method!r} inverts a {size} x {size} matrix for every sample at every step, "
            "which takes long. Use an explicit method if the field is not stiff, or solve for a smaller latent state. "
            "If the first axis of a tensor is the batch, the tensor must have two axes or more. "
            f"Received: a state of shape {[tuple(leaf.shape) for leaf in tf.nest.flatten(y0)]}",
            stacklevel=2,
        )
