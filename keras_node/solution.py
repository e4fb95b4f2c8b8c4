"""What a solve returns: the states, the work that they took, and how the solve ended."""

import enum
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_node.events import EventHistory
from keras_node.trees import Nest


class Status(enum.IntEnum):
    """How a solve ended. Unless it is `SUCCESS`, the states that the solve did not reach are NaN.

    - `SUCCESS` (0): the solve reached the last time.
    - `MAX_STEPS` (1): the solve attempted as many steps as the solver allows.
    - `NON_FINITE` (2): a NaN or infinite value appeared in the state.
    - `STEP_SIZE_UNDERFLOW` (3): the next step would have been too short to move the time, or a step was rejected that
      rounding kept from becoming shorter.
    - `BAD_TIMES` (4): the times are not finite or not monotonic. Times that are known before the solve raise a
      `ValueError` instead.
    - `NO_CONVERGENCE` (5): Newton's method did not converge at a stage of an implicit method, with constant steps, or
      with adaptive steps until they became too short.
    - `MAX_EVENTS` (6): more than `max_events` events happened in a sample, which then stopped.
    - `GRAZING_EVENT` (7): an event function is zero, and so is its rate of change, so the state touches the surface of
      the event but need not pass it. The solve cannot go on from there, and the event time has no derivative.
    - `NOT_SEPARABLE` (8): the solver is symplectic, but the rate of the positions depends on positions, or the rate of
      the velocities on velocities, where the solve starts.
    """

    SUCCESS = 0
    MAX_STEPS = 1
    NON_FINITE = 2
    STEP_SIZE_UNDERFLOW = 3
    BAD_TIMES = 4
    NO_CONVERGENCE = 5
    MAX_EVENTS = 6
    GRAZING_EVENT = 7
    NOT_SEPARABLE = 8


class Stats(NamedTuple):
    """The work of a solve, as int32 tensors: scalars, or `(batch,)` with per-sample steps.

    Attributes:
        num_evaluations: number of evaluations of the vector field.
        num_steps: number of accepted steps.
        num_rejected: number of attempted steps that were rejected, because their error was too large, because an event
            happened inside the step or, with an implicit method, because Newton's method did not converge.
        num_bound_by_stability: number of accepted steps of an explicit method that were about as long as its stability
            allows, and not as its accuracy would. If these are most of the steps, the problem is stiff. It is 0 with
            constant steps.
        num_factorizations: number of Jacobians that an implicit method computed and factorized, one for each attempted
            step. Each takes one evaluation, and a vector-Jacobian product for every component of a sample.
        num_iterations: number of iterations of Newton's method. Each takes one evaluation.
    """

    num_evaluations: tf.Tensor
    num_steps: tf.Tensor
    num_rejected: tf.Tensor
    num_bound_by_stability: tf.Tensor
    num_factorizations: tf.Tensor
    num_iterations: tf.Tensor

    @classmethod
    def zeros(cls) -> "Stats":
        """The work of a solve that did nothing."""
        return cls(*[tf.constant(0)] * len(cls._fields))


class Solution(NamedTuple):
    """The solution of an initial value problem at the requested times.

    Attributes:
        ts: the times, `(T,)` or `(T, batch)`.
        ys: the states at these times, in the structure of the state, with a new first axis of length `T`.
        stats: the work of the solve, a `Stats`.
        status: how the solve ended, an int32 value of `Status`: `(batch,)` with per-sample steps, events or jumps,
            otherwise a scalar.
        events: the events of the solve, a `keras_node.EventHistory`, or `None` for a solve without `event`.
    """

    ts: tf.Tensor
    ys: Nest
    stats: Stats
    status: tf.Tensor
    events: EventHistory | None = None


STATUS_HELP = {
    Status.MAX_STEPS: "`max_steps` was reached before the last time; if the field is stiff, use an implicit method, "
    'such as solver="esdirk43", and if it is implicit already, check the `jacobian` that you pass; otherwise increase '
    "`max_steps`, `rtol` or `atol`, or use constant steps with `num_steps`.",
    Status.NON_FINITE: "a NaN or infinite value appeared; look for one in the data, and for an overflow in the vector "
    "field or its weights; with an implicit method and constant steps, also try other steps, since its equations may "
    "be singular.",
    Status.STEP_SIZE_UNDERFLOW: "the step size became too small to move the time; the state goes to infinity, or the "
    "field jumps, or it is too stiff for an explicit method, or the tolerances are too small for the dtype of the "
    "state.",
    Status.BAD_TIMES: "`ts` is not finite or not monotonic; pass times that all increase or all decrease.",
    Status.NO_CONVERGENCE: "Newton's method did not converge; take shorter constant steps, or adaptive ones, and make "
    "sure that the samples of a batch do not influence each other.",
    Status.MAX_EVENTS: "more than `max_events` events happened in a sample; increase `max_events`, or add a terminal "
    "event, if events follow each other ever faster.",
    Status.GRAZING_EVENT: "an event function is zero and does not change there, so whether the event happens is not "
    "defined; end the solve before by a terminal event, or choose a `reset` that moves the state off the event.",
    Status.NOT_SEPARABLE: "a symplectic method needs a field in which the rate of the positions depends on the "
    "velocities (or momenta) only, and the rate of the velocities on the positions and the time only; for friction, or "
    'an energy that is no sum of two parts, use another method, such as solver="tsit5".',
}
STABILITY_HELP = (
    "of which were as short as the stability of an explicit method demands; if these are most of them, the field is "
    "stiff."
)


def check_status(status: tf.Tensor, value: Nest, what: str, stats: Stats | None = None) -> Nest:
    """Returns `value`, and raises `tf.errors.InvalidArgumentError` if any status is a failure.

    If the function or model around the solve is compiled with XLA, nothing can raise. There, only the NaN in the result
    of a failed solve shows the failure.

    Args:
        status: values of `Status`.
        value: a nest of tensors. In a graph, it becomes available after the check.
        what: what failed, at the beginning of the message.
        stats: the work of the solve, for the message.
    """
    succeeded = tf.reduce_all(status == int(Status.SUCCESS))
    if tf.executing_eagerly():
        if not succeeded:
            raise tf.errors.InvalidArgumentError(None, None, _explanation(np.array(status), what, stats))
        return value
    # A graph cannot choose words, so the message explains every status.
    message: list = [f"{what} failed with status", status]
    if stats is not None:
        message += ["after", stats.num_steps, "steps,", stats.num_bound_by_stability, STABILITY_HELP]
    message += [" ".join(f"Status {int(number)}: {text}" for number, text in STATUS_HELP.items())]
    with tf.control_dependencies([tf.debugging.Assert(succeeded, message)]):
        return tf.nest.map_structure(tf.identity, value)


def _explanation(status: np.ndarray, what: str, stats: Stats | None) -> str:
    """What happened and what to do, for statuses of which one at least is a failure."""
    failed = np.flatnonzero(status)
    kinds = [Status(number) for number in np.unique(status[status != 0])]
    text = f"{what} failed with status {', '.join(f'{int(kind)} ({kind.name})' for kind in kinds)}"
    if status.ndim:
        text += f" in {failed.size} of {status.size} samples, the first of which is number {failed[0]},"
    if stats is not None:
        steps, bound = (np.ravel(n)[failed[0]] for n in (stats.num_steps, stats.num_bound_by_stability))
        text += f" after {steps} steps"
        if 2 * bound > steps:
            text += f", {bound} of which were as short as the stability of the method demands: the field is stiff"
    return " ".join([f"{text}.", *(f"Status {int(kind)}: {STATUS_HELP[kind]}" for kind in kinds)])
