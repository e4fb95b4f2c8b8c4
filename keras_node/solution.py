"""What a solve returns: the states, how much work they took, and whether to trust them."""

import enum
from typing import Any, NamedTuple

import tensorflow as tf


class Status(enum.IntEnum):
    """How a solve ended. Anything but `SUCCESS` comes with NaN in the states it did not reach.

    - `SUCCESS`: it reached the last time.
    - `MAX_STEPS`: it took as many steps as the solver allows.
    - `NON_FINITE`: a NaN or infinite value appeared in the state.
    - `STEP_SIZE_UNDERFLOW`: the next step would have been too short for its time to move.
    - `BAD_TIMES`: the times are not finite, or turn back. If they are known before the solve, it raises `ValueError`.
    """

    SUCCESS = 0
    MAX_STEPS = 1
    NON_FINITE = 2
    STEP_SIZE_UNDERFLOW = 3
    BAD_TIMES = 4


class Stats(NamedTuple):
    """The work done by a solve, as int32 tensors: scalars, or `(batch,)` with per-sample steps.

    Attributes:
        num_evaluations: calls of the vector field.
        num_steps: accepted steps.
        num_rejected: attempted steps whose error was too large.
    """

    num_evaluations: tf.Tensor
    num_steps: tf.Tensor
    num_rejected: tf.Tensor


class Solution(NamedTuple):
    """The solution of an initial value problem at the requested times.

    Attributes:
        ts: the times, `(T,)` or `(T, batch)`.
        ys: the states at these times, the state's structure with a new first axis of length `T`.
        stats: a `Stats`.
        status: int32, a value of `Status`; `(batch,)` with per-sample steps, else a scalar.
    """

    ts: tf.Tensor
    ys: Any
    stats: Stats
    status: tf.Tensor


STATUS_HELP = (
    "Status 1: `max_steps` was reached before the last time; raise `max_steps`, loosen `rtol` and `atol`, or "
    "give a constant `num_steps`. Status 2: a NaN or infinite value appeared; look for an overflow in the "
    "vector field, its inputs or its weights. Status 3: the step size fell below the resolution of time; the "
    "problem is too stiff or singular, or the tolerances are too tight for its dtype. Status 4: `ts` is not finite or "
    "not monotonic; pass times that all increase or all decrease."
)


def check_status(status: tf.Tensor, value: Any, what: str) -> Any:
    """Returns `value`, and raises `tf.errors.InvalidArgumentError` if any status tells of a failure.

    Under XLA nothing can raise; the NaN that a failed solve gives must tell there.
    """
    check = tf.debugging.Assert(
        tf.reduce_all(status == int(Status.SUCCESS)),
        [f"{what} failed with status", status, STATUS_HELP],
    )
    if check is None:  # Eagerly, an assertion that holds returns nothing.
        return value
    with tf.control_dependencies([check]):
        return tf.nest.map_structure(tf.identity, value)
