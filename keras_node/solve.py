"""A solve as every gradient method sees it: from an initial state to the states at the requested times."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_node.clock import Clock, make_clock
from keras_node.integrate import integrate
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
    """

    vector_field: Callable[[tf.Tensor, Nest, list[tf.Tensor]], Nest]
    y0: Nest
    ts: tf.Tensor
    params: list[tf.Tensor]
    solver: RungeKutta
    throw: bool
    times_vary: bool


class Trajectory(NamedTuple):
    """States at the requested times, the work they took and how the solve ended."""

    ys: Any
    stats: Stats
    status: tf.Tensor


def solve(problem: Problem) -> Trajectory:
    """Integrates forwards through `ts`; differentiable by ordinary backpropagation."""
    vector_field, y0, ts, params, solver = problem[:5]
    clock, readings = _clock(ts, solver, y0)

    def rates(t, y, rate):
        del rate
        return Rates(vector_field(t, y, params))

    if ts.shape[0] == 2:
        integral = integrate(rates, y0, clock, solver)
        ys = tf.nest.map_structure(lambda a, b: tf.stack([a, b]), y0, integral.y1)
    else:
        output = DenseOutput(solver.tableau, readings)
        integral = integrate(rates, y0, clock, solver, observer=output)
        ys = output.result(integral.memory, y0)
    return Trajectory(ys, integral.stats, integral.status)


def per_sample_times(ts: tf.Tensor, solver: RungeKutta, y0: Nest) -> tf.Tensor:
    """Gives every sample its own copy of shared times where the solver steps per sample."""
    if solver.per_sample and ts.shape.rank == 1:
        batch = tf.shape(tf.nest.flatten(y0)[0])[0]
        ts = tf.tile(ts[:, None], [1, batch])
    return ts


def _clock(ts: tf.Tensor, solver: RungeKutta, y0: Nest) -> tuple[Clock, tf.Tensor]:
    """The clock of a solve, and its readings at `ts`."""
    ts = per_sample_times(ts, solver, y0)
    if solver.num_steps is not None:
        clock = make_clock(ts, solver.per_sample)
        return clock, clock.stops
    clock = make_clock(tf.stack([ts[0], ts[-1]]), solver.per_sample)
    return clock, clock.read(ts)
