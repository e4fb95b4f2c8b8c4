"""The only time loop: constant and adaptive steps, joint or per sample, forward and backward in time.

It knows nothing about gradients, layers or Keras. Gradient methods pass their own vector fields to it, and observers
that see its steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import tensorflow as tf

from keras_node import trees
from keras_node.clock import Clock, Segment
from keras_node.event_detector import EventDetector
from keras_node.interpolation import Progress
from keras_node.loop_start import first_evaluations, spacing, step_limit
from keras_node.loop_state import Integral, LoopState, conclude, is_finite, sees_stability
from keras_node.solvers.newton import ConstantField
from keras_node.solvers.reversible import reversible_step
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates, Step, is_bound_by_stability, quadrature_rate, rk_step
from keras_node.step_size import Norm, rms_norm, rms_norm_of_moving
from keras_node.trees import Nest

VectorFieldWithSpeed: TypeAlias = Callable[[tf.Tensor, Nest, tf.Tensor], Rates]  # f(t, y, speed)


class Observer(Protocol):
    """Sees every attempted step and keeps a memory, a nest of tensors of fixed shapes."""

    def start(self, y0: Nest) -> Nest:
        """Returns the memory before the first step."""

    def update(self, memory: Any, step: Step, progress: Progress) -> Nest:
        """Returns the memory after an attempted step."""


def integrate(
    vector_field: VectorFieldWithSpeed,
    y0: Nest,
    clock: Clock,
    solver: RungeKutta,
    *,
    quadrature: Nest = (),
    observers: Sequence[Observer] = (),
    jump: Callable[[tf.Tensor, Nest], Nest] | None = None,
    norm: Norm | None = None,
    first_step: tf.Tensor | None = None,
    constant_field: ConstantField | None = None,
    num_derivatives: int = 0,
    detector: EventDetector | None = None,
    coupling: float | None = None,
) -> Integral:
    """Integrates `dy/dt = f(t, y)` from the clock's first stop to its last.

    Args:
        vector_field: `f(t, y, speed)` returns `Rates`. `t` and the `speed` of the clock are scalars or `(batch,)`.
        y0: the initial state, a nest of float tensors, `(batch, ...)` if times have a batch axis.
        clock: a `Clock`. At each of its stops a step ends.
        solver: the method and the control of its step size.
        quadrature: initial values of the quadratures (see `Rates`).
        observers: objects that see every attempted step.
        jump: `jump(i, y)` returns the state after stop `i` from the state `y` before it, for the stops between the
            first and the last. The field is evaluated again after a jump.
        norm: the norm of the error. By default it is the root mean square, over the whole state or over each sample.
            Samples at rest do not count.
        first_step: the first step that an adaptive solve attempts, in units of the clock, if the caller knows a better
            one than the solver; a scalar, or `(batch,)` with per-sample steps.
        constant_field: the same field with constant parameters, for an implicit method.
        num_derivatives: how often you can differentiate the result of an implicit method, by ordinary backpropagation.
        detector: looks for events. A sample in which one happens stands still from there on. Only with per-sample
            steps.
        coupling: makes steps of an explicit method that can be undone (see `reversible_step`). By default steps are
            ordinary ones.

    Returns:
        An `Integral`.
    """
    tableau, controller, per_sample = solver.tableau, solver.controller, solver.per_sample
    # A reversible step begins at the companion, where the last step has not evaluated the field.
    fsal = tableau.fsal and coupling is None
    # In a joint solve of samples with their own times, some may be at rest in a segment.
    may_rest = norm is None and clock.speed.shape.rank == 2 and not per_sample
    end_of_clock = clock.end
    # The shape of everything that controls the loop: one value, or one for each sample.
    sample_shape = tf.shape(end_of_clock)
    several_segments = clock.num_segments != 1
    last_index = tf.maximum(clock.count - 1, 0) if several_segments else 0
    first_segment = clock.segment(tf.zeros(sample_shape, tf.int32) if several_segments else 0)
    first_norm: Norm = norm or functools.partial(rms_norm, per_sample=per_sample)
    if may_rest:
        first_norm = rms_norm_of_moving(first_segment.speed)
    first_spacing = None if solver.adaptive or several_segments else spacing(first_segment, solver)

    def on_the_way(index: Nest, reading: tf.Tensor) -> tf.Tensor:
        """Whether the end is not reached yet."""
        return index < clock.count if several_segments else reading < end_of_clock

    def where_running(s: LoopState, new: Any, old: Any) -> Any:
        # A joint solve takes a step only if it is running.
        return tf.where(s.running, new, old) if per_sample else new

    def end_of_step(s: LoopState, segment: Segment) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The reading at which the next step ends, whether the segment ends there, and the proposed length."""
        if solver.adaptive:
            proposed = s.step_size
            # The last step may be up to 1 % longer, so that no tiny step follows it.
            lands = tf.multiply(proposed, 1.01) >= tf.subtract(segment.stop, s.reading)
            end = tf.add(s.reading, proposed)
        else:
            # Steps are counted from the start of the segment, because a sum of lengths would drift.
            proposed, number = spacing(segment, solver) if first_spacing is None else first_spacing
            done = tf.cast(s.steps_done + 1, proposed.dtype)
            lands = done >= number
            end = tf.minimum(segment.start + done * proposed, segment.stop)
        end = trees.where(lands, segment.stop, end)
        if detector is not None:
            end, lands = tf.where(s.detected.landing, s.detected.target, end), lands & ~s.detected.landing
        return end, lands, proposed

    def take_step(s: LoopState, segment: Segment, dt: tf.Tensor) -> Step:
        def inside(t: tf.Tensor, y: Nest) -> Rates:
            return vector_field(segment.inside(t), y, segment.speed)

        t = segment.time(s.reading)
        if coupling is not None:
            return reversible_step(solver, inside, t, dt, s.y, s.companion, coupling)
        return rk_step(
            solver,
            inside,
            t,
            dt,
            s.y,
            k1=s.k1 if fsal else None,
            constant_field=constant_field and constant_field.inside(segment),
            num_derivatives=num_derivatives,
        )

    def body(s: LoopState) -> LoopState:
        index = tf.minimum(s.segment, last_index) if several_segments else 0
        segment = clock.segment(index) if several_segments else first_segment
        end, lands, proposed = end_of_step(s, segment)
        # The length of a step is the difference of two readings, so their rounding errors do not add up.
        length = tf.subtract(where_running(s, end, s.reading), s.reading)
        dt = tf.multiply(length, segment.speed)
        step = take_step(s, segment, dt)
        norm = rms_norm_of_moving(segment.speed) if may_rest and several_segments else first_norm
        if detector is not None:
            norm = detector.norm(s.running & ~s.detected.landing)
        decision = controller.decide(length, step.error, s.y, step.y1, s.history, norm)
        accept, finite, converged, num_iterations = decision.accept, decision.finite, s.converged, s.num_iterations
        if step.convergence is not None:
            failed, is_number = ~step.convergence.converged, is_finite(step.y1, per_sample)
            accept = accept & ~failed
            # Iterations that leave the domain of the field end in NaN, and that is the reason to report.
            converged = where_running(s, ~failed | ~is_number, s.converged)
            finite = (finite | failed) & is_number
            num_iterations = tf.add(num_iterations, where_running(s, step.convergence.num_iterations, 0))
        detected = s.detected
        if detector is not None:
            # The last step to an event is a part of a step that was accepted.
            accept = accept | detected.landing
            last = end >= end_of_clock
            detected = detector.update(detected, tableau, step, s.reading, end, s.running & accept, last)
            accept = accept & (s.detected.landing | ~detected.landing)
        accepted = where_running(s, accept, False)
        bound_by_stability = s.num_bound_by_stability
        if sees_stability(solver):
            bound = accepted & is_bound_by_stability(tableau, step, per_sample)
            bound_by_stability = tf.add(bound_by_stability, tf.cast(bound, tf.int32))

        def keep(new: Nest, old: Nest) -> Nest:
            return trees.where(accepted, new, old)

        reading, y = keep(end, s.reading), keep(step.y1, s.y)
        k1 = keep(step.k[-1], s.k1) if fsal else ()
        elapsed = dt if segment.speed.shape.rank == 0 else length
        gained = trees.add(s.quadrature, trees.scale(elapsed, quadrature_rate(tableau, step)))
        progress = Progress(index, s.reading, end, accepted)
        memories = tuple(o.update(m, step, progress) for o, m in zip(observers, s.memories, strict=True))

        step_size, following, restarts = decision.step_size, s.segment, s.num_restarts
        steps_done = s.steps_done if solver.adaptive else where_running(s, s.steps_done + 1, s.steps_done)
        if several_segments:
            arrived = accepted & lands
            # If a stop cut a step short, its length says little about the length of the next step.
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
            # Time must move, and a rejected step must become shorter, which rounding may prevent. Otherwise the loop
            # would attempt the same step forever.
            next_end = tf.add(reading, step_size)
            running = running & (next_end > reading) & (decision.accept | (next_end < end))
        elif tableau.implicit:
            running = running & (accept if detector is None else accept | detected.landing)
        if detector is not None:
            running = running & ~detected.landed
        return LoopState(
            running=running,
            reading=reading,
            segment=following,
            steps_done=steps_done,
            step_size=tf.stop_gradient(where_running(s, step_size, s.step_size)),
            y=y,
            companion=keep(step.companion, s.companion) if coupling is not None else (),
            quadrature=keep(gained, s.quadrature),
            k1=k1,
            history=decision.history,
            memories=memories,
            detected=detected,
            finite=where_running(s, finite, s.finite),
            num_attempts=tf.add(s.num_attempts, where_running(s, 1, 0)),
            num_steps=tf.add(s.num_steps, tf.cast(accepted, tf.int32)),
            num_bound_by_stability=bound_by_stability,
            num_restarts=restarts,
            converged=converged,
            num_iterations=num_iterations,
        )

    def after_stop(
        arrived: tf.Tensor, index: tf.Tensor, reading: tf.Tensor, y: Nest, k1: Nest, restarts: tf.Tensor
    ) -> tuple[Nest, Nest, tf.Tensor]:
        assert jump is not None
        index = tf.minimum(index, last_index)
        y = trees.where(arrived, jump(index, y), y)
        if fsal:
            segment = clock.segment(index)
            k1 = vector_field(segment.time(reading), y, segment.speed)
            restarts = restarts + tf.cast(arrived, tf.int32)
        return y, k1, restarts

    k1, step_size, evaluations = first_evaluations(
        vector_field,
        y0,
        first_segment,
        clock,
        solver,
        sample_shape,
        first_norm if detector is None else detector.norm(end_of_clock > 0),
        first_step,
        needs_rate=fsal or detector is not None,
    )
    zeros = tf.zeros(sample_shape, tf.int32)
    detected: Nest = ()
    if detector is not None:
        detected = detector.start(first_segment.first, y0, k1.y)
    finite = is_finite(k1.y, per_sample) if k1 != () else tf.fill(sample_shape, True)
    reading = tf.zeros(sample_shape, clock.stops.dtype)
    start = LoopState(
        running=finite & on_the_way(zeros, reading) & (True if detector is None else ~detected.stuck),
        reading=reading,
        segment=zeros if several_segments else (),
        steps_done=() if solver.adaptive else zeros,
        step_size=step_size,
        y=y0,
        companion=y0 if coupling is not None else (),
        quadrature=quadrature,
        k1=k1 if fsal else (),
        history=controller.start(step_size),
        memories=tuple(observer.start(y0) for observer in observers),
        detected=detected,
        finite=finite,
        num_attempts=zeros,
        num_steps=zeros,
        num_bound_by_stability=zeros if sees_stability(solver) else (),
        num_restarts=zeros,
        converged=tf.equal(zeros, 0) if tableau.implicit else (),
        num_iterations=zeros if tableau.implicit else (),
    )
    (s,) = trees.while_loop(
        lambda s: tf.reduce_any(s.running) if per_sample else s.running,
        lambda s: (body(s),),
        (start,),
        # To find an event and to land on it takes one more attempt than to pass it.
        maximum_iterations=step_limit(solver, clock) + int(detector is not None),
    )

    return conclude(s, on_the_way(s.segment, s.reading), evaluations, solver, coupling)
