"""The one time loop: constant and adaptive steps, joint or per sample, forwards and backwards in time.

It knows nothing of gradients, layers or Keras. Gradient methods give it their own vector fields and watch its
steps through an observer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.clock import Clock
from keras_node.interpolation import Progress
from keras_node.solution import Stats, Status
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates, Step, quadrature_rate, rk_step
from keras_node.step_size import Norm, first_step_size, rms_norm
from keras_node.trees import Nest

_LONGER_THAN_ALL = 1e30  # infinity times zero, as a converter may write a selection, would be no number


class Observer(Protocol):
    """Looks at every attempted step and keeps a memory of what it saw, a nest of tensors of fixed shapes."""

    def start(self, y0: Nest) -> Any: ...

    def update(self, memory: Any, step: Step, progress: Progress) -> Any: ...


class Integral(NamedTuple):
    """How an integration ended.

    Attributes:
        y1: the state at the last time; NaN where the solve failed.
        quadrature: the integral of the quadrature's rates, added to its initial value; NaN likewise.
        memories: what every observer kept.
        stats: a `Stats`.
        status: a value of `Status`.
    """

    y1: Nest
    quadrature: Nest
    memories: tuple
    stats: Stats
    status: tf.Tensor


class _LoopState(NamedTuple):
    running: tf.Tensor  # whether there is more to do
    reading: tf.Tensor  # of the clock
    segment: tf.Tensor  # index; () where there is one only
    steps_done: tf.Tensor  # in the segment, by which constant steps are counted; () where steps are adaptive
    step_size: tf.Tensor  # to attempt next
    y: Nest
    quadrature: Nest
    k1: Rates | tuple  # the rates at (reading, y) of a method that is first same as last, else ()
    history: tuple[tf.Tensor, ...]  # of the controller
    memories: tuple  # of the observers
    finite: tf.Tensor  # whether the last error estimate was a finite number
    num_attempts: tf.Tensor
    num_steps: tf.Tensor
    num_restarts: tf.Tensor  # evaluations after jumps


def integrate(
    vector_field: Callable[[tf.Tensor, Nest, tf.Tensor], Rates],
    y0: Nest,
    clock: Clock,
    solver: RungeKutta,
    *,
    quadrature: Nest = (),
    observers: Sequence[Observer] = (),
    jump: Callable[[tf.Tensor, Nest], Nest] | None = None,
    norm: Norm | None = None,
    first_step: tf.Tensor | None = None,
) -> Integral:
    """Integrates `dy/dt = f(t, y)` from the clock's first stop to its last.

    Args:
        vector_field: `f(t, y, speed)` gives `Rates`; `t` and the clock's `speed` are scalars or `(batch,)`.
        y0: the initial state, a nest of float tensors, `(batch, ...)` where times have a batch axis.
        clock: a `Clock`; a step ends at every one of its stops.
        solver: the method and the control of its step size.
        quadrature: initial values of the quadratures (see `Rates`).
        observers: see every attempted step.
        jump: `jump(i, y)`, the state after the `i`-th stop from the state before it, for the stops between
            the first and the last. The field is evaluated afresh there.
        norm: of the error; by default its root mean square, over the whole state or that of each sample.
        first_step: what an adaptive solve attempts first, in units of the clock, where more is known of it than the
            solver says; one value, or with per-sample steps one for each sample.
    """
    tableau, controller, per_sample = solver.tableau, solver.controller, solver.per_sample
    norm = norm or functools.partial(rms_norm, per_sample=per_sample)
    end_of_clock = clock.end
    # The shape of all that steers the loop: one value, or one for each sample.
    sample_shape = tf.shape(end_of_clock)
    several_segments = clock.num_segments != 1
    last_index = tf.maximum(clock.count - 1, 0) if several_segments else 0
    first_segment = clock.segment(tf.zeros(sample_shape, tf.int32) if several_segments else 0)
    first_spacing = None if solver.adaptive else _spacing(first_segment, solver)

    def on_the_way(index, reading):
        return index < clock.count if several_segments else reading < end_of_clock

    def where_running(s: _LoopState, new, old):
        # A joint solve takes no step unless it is running.
        return tf.where(s.running, new, old) if per_sample else new

    def end_of_step(s: _LoopState, segment):
        """The reading at which the next step ends, whether that is the end of the segment, and the length proposed."""
        if solver.adaptive:
            proposed = s.step_size
            # A last step is stretched by up to 1 % rather than followed by a tiny one.
            lands = tf.multiply(proposed, 1.01) >= tf.subtract(segment.stop, s.reading)
            end = tf.add(s.reading, proposed)
        else:
            # Counted from the start of the segment: a sum of lengths would drift.
            proposed, number = _spacing(segment, solver) if several_segments else first_spacing
            done = tf.cast(s.steps_done + 1, proposed.dtype)
            lands = done >= number
            end = tf.minimum(segment.start + done * proposed, segment.stop)
        return trees.where(lands, segment.stop, end), lands, proposed

    def body(s: _LoopState):
        index = tf.minimum(s.segment, last_index) if several_segments else 0
        segment = clock.segment(index) if several_segments else first_segment
        end, lands, proposed = end_of_step(s, segment)
        # What passes is the difference of two readings, however they were rounded.
        length = tf.subtract(where_running(s, end, s.reading), s.reading)
        dt = tf.multiply(length, segment.speed)
        step = rk_step(
            tableau,
            lambda t, y: vector_field(segment.inside(t), y, segment.speed),
            t=segment.time(s.reading),
            dt=dt,
            y0=s.y,
            k1=s.k1 if tableau.fsal else None,
        )
        decision = controller.decide(length, step.error, s.y, step.y1, s.history, norm)
        accepted = where_running(s, decision.accept, False)

        def keep(new, old):
            return trees.where(accepted, new, old)

        reading, y = keep(end, s.reading), keep(step.y1, s.y)
        k1 = keep(step.k[-1], s.k1) if tableau.fsal else ()
        elapsed = dt if segment.speed.shape.rank == 0 else length
        gained = trees.add(s.quadrature, trees.scale(elapsed, quadrature_rate(tableau, step)))
        progress = Progress(index, s.reading, end, accepted)
        memories = tuple(o.update(m, step, progress) for o, m in zip(observers, s.memories, strict=True))

        step_size, following, restarts = decision.step_size, s.segment, s.num_restarts
        steps_done = s.steps_done if solver.adaptive else where_running(s, s.steps_done + 1, s.steps_done)
        if several_segments:
            arrived = accepted & lands
            # A step that was cut short at a stop says little of the length of the next.
            step_size = trees.where(arrived, tf.maximum(step_size, proposed), step_size)
            following = following + tf.cast(arrived, tf.int32)
            steps_done = steps_done if solver.adaptive else tf.where(arrived, 0, steps_done)
            if jump is not None:
                jumps = arrived & (following <= last_index)
                y, k1, restarts = tf.cond(
                    tf.reduce_any(jumps),
                    lambda: after_stop(jumps, following, reading, y, k1, restarts),
                    lambda: (y, k1, restarts),
                )

        running = s.running & on_the_way(following, reading)
        if solver.adaptive:
            # Time must move: a step that the clock cannot resolve would be attempted for ever.
            running = running & (tf.add(reading, step_size) > reading)
        return _LoopState(
            running=running,
            reading=reading,
            segment=following,
            steps_done=steps_done,
            step_size=tf.stop_gradient(where_running(s, step_size, s.step_size)),
            y=y,
            quadrature=keep(gained, s.quadrature),
            k1=k1,
            history=decision.history,
            memories=memories,
            finite=where_running(s, decision.finite, s.finite),
            num_attempts=tf.add(s.num_attempts, where_running(s, 1, 0)),
            num_steps=tf.add(s.num_steps, tf.cast(accepted, tf.int32)),
            num_restarts=restarts,
        )

    def after_stop(arrived, index, reading, y, k1, restarts):
        index = tf.minimum(index, last_index)
        y = trees.where(arrived, jump(index, y), y)
        if tableau.fsal:
            segment = clock.segment(index)
            k1 = vector_field(segment.time(reading), y, segment.speed)
            restarts = restarts + tf.cast(arrived, tf.int32)
        return y, k1, restarts

    k1, step_size, evaluations = _first_evaluations(
        vector_field, y0, first_segment, clock, solver, sample_shape, norm, first_step
    )
    zeros = tf.zeros(sample_shape, tf.int32)
    finite = _is_finite(k1.y, per_sample) if k1 != () else tf.fill(sample_shape, True)
    reading = tf.zeros(sample_shape, clock.stops.dtype)
    start = _LoopState(
        running=finite & on_the_way(zeros, reading),
        reading=reading,
        segment=zeros if several_segments else (),
        steps_done=() if solver.adaptive else zeros,
        step_size=step_size,
        y=y0,
        quadrature=quadrature,
        k1=k1 if tableau.fsal else (),
        history=controller.start(step_size),
        memories=tuple(observer.start(y0) for observer in observers),
        finite=finite,
        num_attempts=zeros,
        num_steps=zeros,
        num_restarts=zeros,
    )
    (s,) = tf.while_loop(
        lambda s: tf.reduce_any(s.running) if per_sample else s.running,
        lambda s: (body(s),),
        (start,),
        maximum_iterations=step_limit(solver, clock),
    )

    finite = s.finite & _is_finite(s.y, per_sample)
    ended = tf.where(on_the_way(s.segment, s.reading), int(Status.STEP_SIZE_UNDERFLOW), int(Status.SUCCESS))
    status = tf.where(s.running, int(Status.MAX_STEPS), tf.where(finite, ended, int(Status.NON_FINITE)))
    evaluations = evaluations + s.num_restarts + s.num_attempts * _evaluations_per_step(tableau)
    return Integral(
        y1=trees.poison(status != 0, s.y),
        quadrature=trees.poison(tf.reduce_any(status != 0), s.quadrature),
        memories=s.memories,
        stats=Stats(evaluations, s.num_steps, s.num_attempts - s.num_steps),
        status=status,
    )


def _first_evaluations(vector_field, y0, segment, clock, solver, sample_shape, norm, first_step):
    """The rates at the start where they serve, the first step size, and how many evaluations these took."""
    adaptive_start = solver.adaptive and solver.first_step is None and first_step is None
    speed = segment.speed
    k1, evaluations = (), 0
    if solver.tableau.fsal or adaptive_start:
        k1, evaluations = vector_field(segment.inside(segment.first), y0, speed), 1
    if first_step is not None:
        return k1, first_step, evaluations
    if not adaptive_start:
        given = min(solver.first_step, _LONGER_THAN_ALL) if solver.adaptive else solver.step_size or 0.0
        return k1, tf.fill(sample_shape, tf.constant(given, clock.stops.dtype)), evaluations

    def rate_of_change(reading, y):
        return trees.scale(speed, vector_field(segment.time(reading), y, speed).y)

    step_size = first_step_size(rate_of_change, y0, trees.scale(speed, k1.y), clock.end, solver.controller, norm)
    return k1, step_size, evaluations + 1


def _spacing(segment, solver):
    """The distance between the readings of constant steps, and how many steps a segment has."""
    length = segment.stop - segment.start
    if solver.num_steps is not None:
        return length / solver.num_steps, tf.cast(solver.num_steps, length.dtype)
    spacing = tf.constant(solver.step_size, length.dtype)
    # The last step of constant ones, too, may be longer by 1 %.
    return spacing, tf.math.ceil(length / spacing - 0.01)


def _is_finite(x: Nest, per_sample: bool) -> tf.Tensor:
    flags = []
    for leaf in tf.nest.flatten(x):
        axes = np.arange(int(per_sample), leaf.shape.rank)
        flags.append(tf.raw_ops.All(input=tf.math.is_finite(leaf), axis=axes))
    return tf.reduce_all(tf.stack(flags), axis=0)


def _evaluations_per_step(tableau) -> int:
    return tableau.num_stages - 1 if tableau.fsal else tableau.num_stages


def step_limit(solver: RungeKutta, clock: Clock) -> int | tf.Tensor:
    """How many steps a solve attempts at most."""
    if solver.num_steps is None:
        return solver.max_steps
    segments = clock.num_segments
    return solver.num_steps * (tf.shape(clock.speed)[0] if segments is None else segments)
