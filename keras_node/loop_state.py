"""What the time loop carries from step to step, and what becomes of it at the end."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.event_detector import Detected
from keras_node.solution import Stats, Status
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.trees import Nest


class LoopState(NamedTuple):
    """What the time loop carries from one attempted step to the next.

    Attributes:
        running: whether more steps are needed.
        reading: the reading of the clock.
        segment: the index of the segment; `()` if there is only one.
        steps_done: the number of steps done in the segment; `()` if steps are adaptive.
        step_size: the length to attempt next.
        y: the state.
        companion: the second state of reversible steps; otherwise `()`.
        quadrature: the integrals so far of the rates of the quadratures.
        k1: the `Rates` at `reading` and `y` if the method is first same as last; otherwise `()`.
        history: the memory of the controller.
        memories: the memories of the observers.
        detected: what is known about events; `()` without a detector.
        finite: whether the last error estimate was a finite number.
        num_attempts: the number of attempted steps.
        num_steps: the number of accepted steps.
        num_bound_by_stability: how many of these stability bounds, if steps are adaptive and the method is explicit;
            otherwise `()`.
        num_restarts: the number of evaluations after jumps.
        converged: whether Newton's method converged in the last attempt; `()` for an explicit method.
        num_iterations: the number of its iterations; `()` for an explicit method.
    """

    running: tf.Tensor
    reading: tf.Tensor
    segment: Nest
    steps_done: Nest
    step_size: tf.Tensor
    y: Nest
    companion: Nest
    quadrature: Nest
    k1: Nest
    history: tuple[tf.Tensor, ...]
    memories: tuple
    detected: Nest
    finite: tf.Tensor
    num_attempts: tf.Tensor
    num_steps: tf.Tensor
    num_bound_by_stability: Nest
    num_restarts: tf.Tensor
    converged: Nest
    num_iterations: Nest


class Integral(NamedTuple):
    """How an integration ended.

    Attributes:
        y1: the state at the last time, or NaN where the solve failed.
        quadrature: its initial value plus the integral of its rates, or NaN if the solve failed.
        memories: the memory of every observer.
        stats: a `Stats`.
        status: a value of `Status`.
        detected: the events of a solve with a detector; otherwise `None`.
    """

    y1: Nest
    quadrature: Nest
    memories: tuple
    stats: Stats
    status: tf.Tensor
    detected: Detected | None = None


def conclude(s: LoopState, short: tf.Tensor, evaluations: int, solver: RungeKutta, coupling: float | None) -> Integral:
    """Returns how an integration ended.

    Args:
        s: the state after the last step.
        short: whether the end is not reached.
        evaluations: the number of evaluations before the first step.
        solver: the method.
        coupling: that of reversible steps, or `None`.
    """
    tableau, detected = solver.tableau, s.detected if isinstance(s.detected, Detected) else None
    finite = s.finite & is_finite(s.y, solver.per_sample)
    if detected is not None:
        short = short & ~detected.landed
    ended = tf.where(short, int(Status.STEP_SIZE_UNDERFLOW), int(Status.SUCCESS))
    status = tf.where(s.running, int(Status.MAX_STEPS), tf.where(finite, ended, int(Status.NON_FINITE)))
    evaluations = evaluations + s.num_restarts + s.num_attempts * _evaluations_per_step(tableau, coupling)
    nothing = tf.zeros_like(s.num_steps)
    factorizations = iterations = nothing
    if tableau.implicit:
        status = tf.where(s.converged | s.running, status, int(Status.NO_CONVERGENCE))
        factorizations, iterations = s.num_attempts, s.num_iterations
        evaluations = evaluations + iterations
    if detected is not None:
        status = tf.where(detected.stuck, int(Status.GRAZING_EVENT), status)
    failed = tf.not_equal(status, int(Status.SUCCESS))
    return Integral(
        y1=trees.poison(failed, s.y),
        quadrature=trees.poison(tf.reduce_any(failed) if solver.per_sample else failed, s.quadrature),
        memories=s.memories,
        stats=Stats(
            num_evaluations=evaluations,
            num_steps=s.num_steps,
            num_rejected=s.num_attempts - s.num_steps,
            num_bound_by_stability=s.num_bound_by_stability if sees_stability(solver) else nothing,
            num_factorizations=factorizations,
            num_iterations=iterations,
        ),
        status=status,
        detected=detected,
    )


def sees_stability(solver: RungeKutta) -> bool:
    """Whether a solve finds out which of its steps stability bounds."""
    return solver.adaptive and not solver.tableau.implicit


def is_finite(x: Nest, per_sample: bool) -> tf.Tensor:
    """Whether all numbers are finite, in the whole nest or in each sample."""
    flags = []
    for leaf in tf.nest.flatten(x):
        axes = np.arange(int(per_sample), leaf.shape.rank)
        flags.append(tf.raw_ops.All(input=tf.math.is_finite(leaf), axis=axes))
    return flags[0] if len(flags) == 1 else tf.reduce_all(tf.stack(flags), axis=0)


def _evaluations_per_step(tableau: ButcherTableau, coupling: float | None) -> int:
    if tableau.implicit:
        return 1  # for the Jacobian; every iteration is another one
    own = tableau.num_stages - 1 if tableau.fsal else tableau.num_stages
    return own if coupling is None else tableau.num_stages + own
