"""A solve as every gradient method sees it: from an initial state to the states at the requested times."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_node.clock import Clock, make_clock, merge
from keras_node.integrate import Observer, integrate
from keras_node.interpolation import DenseOutput
from keras_node.solution import Stats
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates
from keras_node.trees import Nest


class Problem(NamedTuple):
    """An initial value problem with all that a gradient may be asked for made explicit.

    Attributes:
        vector_field: `f(t, y, params)`, a pure function.
        y0: the initial state.
        ts: times, `(T,)` or `(T, batch)`, monotonic along axis 0.
        params: flat list of float tensors that the field reads.
        solver: a `RungeKutta`.
        throw: whether a failed solve raises where it can.
        times_vary: whether a gradient may be asked for `ts`; not when they are numbers.
        jit_compile: whether to make the solve, and its gradient, an XLA program of its own.
        on_backward: is told the `Stats` and the status of what a gradient solved, and whether a failure is none of its.
    """

    vector_field: Callable[[tf.Tensor, Nest, list[tf.Tensor]], Nest]
    y0: Nest
    ts: tf.Tensor
    params: list[tf.Tensor]
    solver: RungeKutta
    throw: bool
    times_vary: bool
    jit_compile: bool
    on_backward: Callable[[Stats, tf.Tensor, tf.Tensor], None] | None = None


class Trajectory(NamedTuple):
    """States at the requested times, the work they took and how the solve ended."""

    ys: Any
    stats: Stats
    status: tf.Tensor


def solve(problem: Problem, observers: Sequence[Observer] = ()) -> tuple[Trajectory, tuple]:
    """Integrates forwards through `ts`; differentiable by ordinary backpropagation.

    Returns:
        The trajectory and what the observers kept.
    """
    vector_field, y0, ts, params, solver = problem[:5]
    clock, readings = solve_clock(ts, solver, y0)

    def rates(t, y, rate):
        del rate
        return Rates(vector_field(t, y, params))

    # Behind a kink the state goes on as it is, and the field is evaluated afresh.
    jump = (lambda i, y: y) if clock.kinks else None
    output = None if ts.shape[0] == 2 else DenseOutput(solver.tableau, readings)
    watching = observers if output is None else (*observers, output)
    integral = integrate(rates, y0, clock, solver, observers=watching, jump=jump)
    if output is None:
        ys = tf.nest.map_structure(lambda a, b: tf.stack([a, b]), y0, integral.y1)
    else:
        ys = output.result(integral.memories[-1], y0)
    return Trajectory(ys, integral.stats, integral.status), integral.memories[: len(observers)]


def leave_start(problem: Problem, trajectory: Trajectory) -> Trajectory:
    """Adds the gradient of times that equal the first: no step leads to them, yet moving one moves its state."""
    vector_field, y0, ts, params, solver = problem[:5]
    if not problem.times_vary:
        return trajectory
    rate = vector_field(ts[0], y0, params)
    at_start = ts == ts[:1]
    if ts.shape[0] == 2 and not solver.per_sample:
        # A sample at rest beside others that move takes their steps, in which its times have their part.
        at_start = tf.reduce_all(at_start)
    # Zero, with the gradient of `ts[i] - ts[0]`.
    elapsed = tf.where(at_start, ts - ts[:1], 0)

    def leaf(y, dy):
        shape = tf.concat([tf.shape(elapsed), tf.ones([y.shape.rank - elapsed.shape.rank], tf.int32)], 0)
        return y + tf.reshape(elapsed, shape) * tf.where(tf.math.is_finite(dy), dy, 0)

    return trajectory._replace(ys=tf.nest.map_structure(leaf, trajectory.ys, rate))


def per_sample_times(ts: tf.Tensor, solver: RungeKutta, y0: Nest) -> tf.Tensor:
    """Gives every sample its own copy of shared times where the solver steps per sample."""
    if solver.per_sample and ts.shape.rank == 1:
        batch = tf.shape(tf.nest.flatten(y0)[0])[0]
        ts = tf.tile(ts[:, None], [1, batch])
    return ts


def solve_clock(ts: tf.Tensor, solver: RungeKutta, y0: Nest) -> tuple[Clock, tf.Tensor]:
    """The clock of a solve, and its readings at `ts`."""
    ts = per_sample_times(ts, solver, y0)
    if solver.num_steps is not None:
        clock = make_clock(ts, solver.per_sample)
        # Where no time passes between two of `ts`, the reading of the second has a derivative of its own.
        # In brackets, lest rounding put the last one behind the end, where no step arrives.
        readings = clock.read(ts)
        stops = clock.stops if clock.stops.shape.rank == readings.shape.rank else clock.stops[:, None]
        return clock, stops + (readings - tf.stop_gradient(readings))
    times = tf.stack([ts[0], ts[-1]])
    if solver.step_at:
        times, _ = merge(times, tf.constant(solver.step_at, ts.dtype))
    clock = make_clock(times, solver.per_sample, kinks=bool(solver.step_at))
    return clock, clock.stops if clock.num_segments == 1 and ts.shape[0] == 2 else clock.read(ts)
