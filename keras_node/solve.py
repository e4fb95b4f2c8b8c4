"""The problem that every gradient method receives, and its forward solve."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.clock import Clock, make_clock, merge, reorder
from keras_node.event_detector import EventDetector
from keras_node.integrate import Observer, integrate
from keras_node.interpolation import DenseOutput
from keras_node.phase_space import is_separable
from keras_node.pure_function import PureFunction
from keras_node.solution import Stats, Status
from keras_node.solvers.newton import ConstantField
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates
from keras_node.trees import Nest


class PureField(Protocol):
    """The part of a `VectorField` that solves and gradients use."""

    pure: PureFunction
    params: list[tf.Tensor]
    precision: tf.DType | None
    has_jacobian: bool

    @property
    def may_overflow(self) -> bool:
        """Whether the field computes in float16."""

    def __call__(self, t: tf.Tensor, y: Nest, params: list[tf.Tensor]) -> Nest:
        """Returns the rate of change of `y`."""

    def jacobian(self, t: tf.Tensor, y: Nest, params: list[tf.Tensor]) -> tf.Tensor:
        """Returns the Jacobian, if `has_jacobian`."""

    def sources(self, params: list[tf.Tensor]) -> list[tf.Tensor | tf.Variable]:
        """Returns what a tape must watch to differentiate with respect to `params`."""

    def also_reading(self, variables: Sequence[tf.Variable]) -> "PureField":
        """Returns the same field, with the values of `variables` at the end of its `params`."""


class Problem(NamedTuple):
    """An initial value problem. It holds explicitly every tensor that may need a gradient.

    Attributes:
        vector_field: `f(t, y, params)`, a pure function.
        y0: the initial state.
        ts: times, `(T,)` or `(T, batch)`, monotonic along axis 0, in a precision that tells them apart: that of the
            state, or a higher one.
        params: flat list of the float tensors that the field reads.
        solver: a `RungeKutta`.
        throw: whether a failed solve raises an error where it can.
        numbers: the times as float64 if they are numbers, so that the clock is known before the solve runs. `None` if
            they are tensors.
        times_vary: whether the times need a gradient.
        jit_compile: whether to compile the solve and its gradient with XLA, if the graph around them is not compiled. A
            boolean tensor decides it anew each time the graph runs.
        on_backward: a function that the gradient calls with the `Stats` and the status of its own solve, and with
            whether a failure of it is excused.
        backward_status: a zero on which nothing depends. Its gradient is the status of the gradient's own solve, or 0
            if a failure is excused: a computation of gradients can return nothing else. `()` if nobody asks for it.
        detector: looks for events, at which samples stop; `None` for a solve to the last time.
        is_phase: whether this is a part of a longer solve. Then `ts` that equal the first or the last one may lie
            outside of this part, and have no loss.
        coupling: makes the steps of the solve reversible (see `reversible_step`); `None` for ordinary steps.
        exported: whether an exported model may contain the solve (see `new_buffer`).
    """

    vector_field: PureField
    y0: Nest
    ts: tf.Tensor
    params: list[tf.Tensor]
    solver: RungeKutta
    throw: bool
    numbers: np.ndarray | None
    times_vary: bool
    jit_compile: bool | tf.Tensor
    on_backward: Callable[[Stats, tf.Tensor, tf.Tensor], None] | None = None
    backward_status: Nest = ()
    detector: EventDetector | None = None
    is_phase: bool = False
    coupling: float | None = None
    exported: bool = True

    @property
    def forward_solver(self) -> RungeKutta:
        """The solver of the forward solve. With events, every sample has a clock of its own."""
        return self.solver if self.detector is None else dataclasses.replace(self.solver, per_sample=True)

    @property
    def dtype(self) -> tf.DType:
        """The precision of the state."""
        return tf.nest.flatten(self.y0)[0].dtype

    @property
    def constant_field(self) -> ConstantField | None:
        """The field with these parameters as constants, for an implicit method; otherwise `None`."""
        if not self.solver.tableau.implicit:
            return None
        field, params = self.vector_field, trees.stop_gradient(self.params)
        jacobian = (lambda t, y: field.jacobian(t, y, params)) if field.has_jacobian else None
        return ConstantField(lambda t, y: field(t, y, params), jacobian)

    @property
    def precision(self) -> tf.DType:
        """The precision in which the field tells times apart. A float32 layer does not see every float64 time."""
        return tf.float64 if tf.float64 == self.dtype == self.vector_field.precision else tf.float32

    @property
    def times(self) -> tf.Tensor:
        """The times as the field sees them, in the precision of the state."""
        return tf.cast(self.ts, self.dtype)


class Stop(NamedTuple):
    """Where an event has stopped the samples of a solve.

    Attributes:
        time: the time of the event, `(batch,)`, in the precision of the times.
        index: the number of the event, and -1 for a sample without one.
        sides: on which side of zero each event function was before, `(E, batch)`.
    """

    time: tf.Tensor
    index: tf.Tensor
    sides: tf.Tensor

    def limit(self, ts: tf.Tensor) -> tf.Tensor:
        """The times `(T, batch)` of a solve that ends for each sample at its event."""
        return tf.where(self._passes(ts), self.time, ts)

    def limit_gradient(self, ts: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        """The gradient of `ts` from that of the limited times. The time of the event counts as a constant."""
        return tf.where(self._passes(ts), tf.zeros_like(upstream), upstream)

    def _passes(self, ts: tf.Tensor) -> tf.Tensor:
        return (self.index >= 0) & tf.where(ts[-1] < ts[0], ts < self.time, ts > self.time)


class Trajectory(NamedTuple):
    """The states at the requested times, the work that they took, how the solve ended, and with events a `Stop`.

    At the times after its event, a sample has the state at the event.
    """

    ys: Nest
    stats: Stats
    status: tf.Tensor
    stop: Stop | tuple[()] = ()


def solve(problem: Problem, observers: Sequence[Observer] = (), num_derivatives: int = 0) -> tuple[Trajectory, tuple]:
    """Integrates from the first of `ts` to the last. It is differentiable by ordinary backpropagation.

    Args:
        problem: the problem to solve.
        observers: objects that see every attempted step.
        num_derivatives: how often the result of an implicit method can be differentiated.

    Returns:
        The trajectory and the memories of the observers.
    """
    y0, solver, detector = problem.y0, problem.forward_solver, problem.detector
    clock, readings = solve_clock(problem)

    def rates(t: tf.Tensor, y: Nest, speed: tf.Tensor) -> Rates:
        del speed
        return Rates(problem.vector_field(t, y, problem.params))

    # At a kink the state does not change, but the field is evaluated again.
    jump = None if clock.kinks is None else lambda i, y: y
    output = None if problem.ts.shape[0] == 2 else DenseOutput(solver, readings, problem.exported)
    watching = observers if output is None else (*observers, output)
    integral = integrate(
        rates,
        y0,
        clock,
        solver,
        observers=watching,
        jump=jump,
        constant_field=problem.constant_field,
        num_derivatives=num_derivatives,
        detector=detector,
        coupling=problem.coupling,
    )
    stats, detected = integral.stats, integral.detected
    stop: Stop | tuple[()] = ()
    if detector is not None and detected is not None:
        index = tf.where(detected.landed, detected.index, -1)
        # The value is more exact in the precision of times. If the first time moves, so does the reading of the event.
        time, moving = tf.stop_gradient(detector.time(detected.target)), detected.time
        time = time + tf.cast(moving - tf.stop_gradient(moving), time.dtype)
        stop = Stop(time, index, detected.sides)
    if output is None:
        ys = tf.nest.map_structure(lambda a, b: tf.stack([a, b]), y0, integral.y1)
    else:
        memory = integral.memories[-1]
        ys = output.result(memory, y0, None if detector is None else integral.y1)
        if solver.tableau.a_dense:
            stats = stats._replace(num_evaluations=stats.num_evaluations + memory.num_evaluations)
    status = integral.status
    if solver.tableau.symplectic:
        ys, stats, status = _checked_halves(problem, ys, stats, status)
    return Trajectory(ys, stats, status, stop), integral.memories[: len(observers)]


def _checked_halves(problem: Problem, ys: Nest, stats: Stats, status: tf.Tensor) -> tuple[Nest, Stats, tf.Tensor]:
    """The same, but failed if the field is not separable at the start, because a symplectic method would be wrong."""
    t0, params = trees.stop_gradient((problem.times[0], problem.params))
    separable = is_separable(
        lambda y: problem.vector_field(t0, y, params), trees.stop_gradient(problem.y0), status.shape.rank == 1
    )
    status = tf.where(separable | (status != int(Status.SUCCESS)), status, int(Status.NOT_SEPARABLE))
    usable = tf.cast(status != int(Status.NOT_SEPARABLE), problem.dtype)

    def leaf(y: tf.Tensor) -> tf.Tensor:
        return tf.concat([y[:1], trees.align(usable / usable, y[0]) * y[1:]], axis=0)

    ys = trees.each(leaf, ys)
    return ys, stats._replace(num_evaluations=stats.num_evaluations + 3), status


def add_gradient_at_start(problem: Problem, trajectory: Trajectory) -> Trajectory:
    """Adds the gradient of times that equal the first one. No step leads to them, but moving one moves its state."""
    ts, solver = problem.ts, problem.forward_solver
    if not problem.times_vary:
        return trajectory
    rate = problem.vector_field(problem.times[0], problem.y0, problem.params)
    at_start = ts == ts[:1]
    if ts.shape.rank == 2 and not solver.per_sample and (ts.shape[0] == 2 or _steps_end_at_all_times(solver)):
        # A sample at rest among others that move takes their steps, and these already contain its times.
        at_start = tf.reduce_all(at_start, axis=1, keepdims=True)
    # The value is zero, with the gradient of `ts[i] - ts[0]`.
    elapsed = tf.cast(tf.where(at_start, ts - ts[:1], 0), problem.dtype)

    def leaf(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        return y + trees.expand(elapsed, y.shape.rank) * tf.where(tf.math.is_finite(dy), dy, 0)

    return trajectory._replace(ys=tf.nest.map_structure(leaf, trajectory.ys, rate))


def _steps_end_at_all_times(solver: RungeKutta) -> bool:
    """Whether a step ends at each of `ts`."""
    # `num_steps` counts from one time to the next, and a symplectic method has no dense output of its order.
    return solver.num_steps is not None or solver.tableau.symplectic


def solve_clock(problem: Problem) -> tuple[Clock, Nest]:
    """The clock of a solve and its readings at `ts`, or `()` for two times, because these are the ends of the clock."""
    solver, dtype = problem.forward_solver, problem.dtype

    def make(ts: tf.Tensor) -> tuple[Clock, Nest]:
        if solver.num_steps is not None:
            clock, stops = make_clock(ts, dtype, solver.per_sample)
            return clock, () if ts.shape[0] == 2 else clock.readings_at(tf.cast(ts - ts[:1], dtype), stops)
        stops_at_all = _steps_end_at_all_times(solver)
        times, place = ts if stops_at_all or ts.shape[0] == 2 else tf.stack([ts[0], ts[-1]]), None
        if solver.step_at:
            times, place = merge(times, tf.constant(solver.step_at, ts.dtype))
        clock, stops = make_clock(times, dtype, solver.per_sample, problem.precision if solver.step_at else None)
        if ts.shape[0] == 2:
            return clock, ()
        known = None if not stops_at_all else stops if place is None else reorder(stops, place)
        return clock, clock.readings_at(tf.cast(ts - ts[:1], dtype), known)

    return clock_of(problem, make, solver.per_sample)


def adjoint_clock(problem: Problem, solver: RungeKutta, kinks: Sequence[float]) -> tuple[Clock, tf.Tensor]:
    """The clock of a solve from the last time to the first, and the index of its stop at each time, in that order."""

    def make(ts: tf.Tensor) -> tuple[Clock, Nest]:
        times, place = ts[::-1], None
        if kinks:
            times, place = merge(times, tf.constant(kinks, ts.dtype))
        clock, stops = make_clock(times, problem.dtype, solver.per_sample, problem.precision if kinks else None)
        return clock, reorder(stops, place) if kinks else stops

    return clock_of(problem, make, solver.per_sample)


def clock_of(problem: Problem, make: Callable[[tf.Tensor], tuple[Clock, Nest]], per_sample: bool) -> tuple[Clock, Nest]:
    """The clock and the readings or stops that `make(ts)` returns. If times are numbers, they are constants."""
    if problem.numbers is None:
        clock, others = make(problem.ts)
    else:
        with tf.init_scope():  # in eager mode, even inside a graph
            clock, others = make(tf.constant(problem.numbers))
            known = tf.nest.map_structure(np.array, (clock.trimmed()[:-1], others))
        tensors, others = tf.nest.map_structure(tf.constant, known)
        clock = Clock._make((*tensors, clock.kinks))
    if per_sample and problem.ts.shape.rank == 1:
        batch = tf.shape(tf.nest.flatten(problem.y0)[0])[0]
        tensors, others = tf.nest.map_structure(lambda x: _repeated(x, batch), (clock[:-1], others))
        clock = Clock._make((*tensors, clock.kinks))
    return clock, others


def _repeated(x: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """Repeats `x` for every sample, along a new last axis."""
    repeated = tf.repeat(x[..., None], batch, axis=-1)
    return tf.ensure_shape(repeated, [*x.shape, None])
