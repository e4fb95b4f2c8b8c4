"""The one time loop: constant and adaptive steps, joint or per sample, forwards and backwards in time.

It knows nothing of gradients, layers or Keras. Gradient methods give it their own vector fields and watch its
steps through an observer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from keras_node import trees
from keras_node.clock import Clock, pick
from keras_node.interpolation import Progress
from keras_node.solution import Stats, Status
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates, Step, quadrature_rate, rk_step
from keras_node.step_size import Norm, first_step_size, rms_norm
from keras_node.trees import Nest


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
    reading: tf.Tensor  # of the clock
    segment: tf.Tensor
    step_size: tf.Tensor  # to attempt next
    y: Nest
    quadrature: Nest
    k1: Rates | tuple  # the rates at (reading, y) of a method that is first same as last, else ()
    history: tuple[tf.Tensor, ...]  # of the controller
    memories: tuple  # of the observers
    status: tf.Tensor
    num_evaluations: tf.Tensor
    num_steps: tf.Tensor
    num_rejected: tf.Tensor


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
) -> Integral:
    """Integrates `dy/dt = f(t, y)` from the clock's first stop to its last.

    Args:
        vector_field: `f(t, y, rate)` gives `Rates`; `t` and the clock's `rate` are scalars or `(batch,)`.
        y0: the initial state, a nest of float tensors, `(batch, ...)` where times have a batch axis.
        clock: a `Clock`; a step ends at every one of its stops.
        solver: the method and the control of its step size.
        quadrature: initial values of the quadratures (see `Rates`).
        observers: see every attempted step.
        jump: `jump(i, y)`, the state behind the `i`-th stop from the state before it, for the stops between
            the first and the last. The field is evaluated afresh there.
        norm: of the error; by default its root mean square, over the whole state or that of each sample.
    """
    tableau, controller, per_sample = solver.tableau, solver.controller, solver.per_sample
    norm = norm or functools.partial(rms_norm, per_sample=per_sample)
    # The shape of all that steers the loop: one value, or one for each sample.
    control = tf.shape(clock.end)
    several_segments = clock.num_segments != 1
    last_segment = tf.shape(clock.rate)[0] - 1

    def unfinished(s: _LoopState):
        # Segments are counted, since the last ones may be of length zero.
        on_the_way = s.segment <= last_segment if several_segments else s.reading < clock.end
        return (s.status == int(Status.SUCCESS)) & on_the_way

    def body(s: _LoopState):
        running = unfinished(s)
        segment = tf.minimum(s.segment, last_segment) if several_segments else 0
        stop, rate = pick(clock.stops, segment + 1), pick(clock.rate, segment)
        proposed = s.step_size
        if solver.num_steps is not None:
            proposed = (stop - pick(clock.stops, segment)) / solver.num_steps
        # A last step is stretched by up to 1 % rather than followed by a tiny one.
        lands = 1.01 * proposed >= stop - s.reading
        length = tf.where(running, tf.where(lands, stop - s.reading, proposed), 0)
        end = tf.where(lands, stop, s.reading + length)

        step = rk_step(
            tableau,
            lambda t, y: vector_field(clock.inside(segment, t), y, rate),
            t=clock.time(segment, s.reading),
            dt=clock.duration(segment, length),
            y0=s.y,
            k1=s.k1 if tableau.fsal else None,
        )
        decision = controller.decide(length, step.error, s.y, step.y1, s.history, norm)
        always = decision.accept is True and not per_sample
        accepted = running & decision.accept
        keep = (lambda new, old: new) if always else (lambda new, old: trees.where(accepted, new, old))

        reading, y = keep(end, s.reading), keep(step.y1, s.y)
        k1 = keep(step.k[-1], s.k1) if tableau.fsal else ()
        gained = trees.add(s.quadrature, trees.scale(length, quadrature_rate(tableau, step)))
        progress = Progress(segment, s.reading, length, end, accepted)
        memories = tuple(o.update(m, step, progress) for o, m in zip(observers, s.memories, strict=True))

        # A step that was cut short at a stop says little of the length of the next.
        step_size = tf.where(accepted & lands, tf.maximum(decision.step_size, proposed), decision.step_size)
        evaluations = s.num_evaluations + tf.cast(running, tf.int32) * _evaluations_per_step(tableau)
        segment = s.segment
        if several_segments:
            arrived = accepted & lands
            segment = segment + tf.cast(arrived, tf.int32)
            if jump is not None:
                arrived = arrived & (segment <= last_segment)
                y, k1, evaluations = tf.cond(
                    tf.reduce_any(arrived),
                    lambda: behind_stop(arrived, segment, reading, y, k1, evaluations),
                    lambda: (y, k1, evaluations),
                )

        # Time must move: a step that the clock cannot resolve would be attempted for ever.
        moves = lands | (end > s.reading) if solver.num_steps is not None else reading + step_size > reading
        stuck = running & (reading < clock.end) & ~moves
        cause = tf.where(decision.finite, int(Status.STEP_SIZE_UNDERFLOW), int(Status.NON_FINITE))
        return _LoopState(
            reading=reading,
            segment=segment,
            step_size=tf.stop_gradient(tf.where(running, step_size, s.step_size)),
            y=y,
            quadrature=keep(gained, s.quadrature),
            k1=k1,
            history=decision.history,
            memories=memories,
            status=tf.where(stuck, cause, s.status),
            num_evaluations=evaluations,
            num_steps=s.num_steps + tf.cast(accepted, tf.int32),
            num_rejected=s.num_rejected + tf.cast(running & ~accepted, tf.int32),
        )

    def behind_stop(arrived, segment, reading, y, k1, evaluations):
        segment = tf.minimum(segment, last_segment)
        y = trees.where(arrived, jump(segment, y), y)
        if tableau.fsal:
            k1 = vector_field(clock.time(segment, reading), y, pick(clock.rate, segment))
            evaluations = evaluations + tf.cast(arrived, tf.int32)
        return y, k1, evaluations

    first_segment = tf.zeros(control, tf.int32) if several_segments else ()
    k1, step_size, evaluations = _first_evaluations(vector_field, y0, clock, solver, control, norm)
    status = tf.zeros(control, tf.int32)
    if k1 != ():
        status = tf.where(_is_finite(k1.y, per_sample), status, int(Status.NON_FINITE))
    start = _LoopState(
        reading=tf.zeros(control, clock.stops.dtype),
        segment=first_segment,
        step_size=step_size,
        y=y0,
        quadrature=quadrature,
        k1=k1 if tableau.fsal else (),
        history=controller.start(step_size),
        memories=tuple(observer.start(y0) for observer in observers),
        status=status,
        num_evaluations=tf.fill(control, evaluations),
        num_steps=tf.zeros(control, tf.int32),
        num_rejected=tf.zeros(control, tf.int32),
    )
    (s,) = tf.while_loop(
        lambda s: tf.reduce_any(unfinished(s)),
        lambda s: (body(s),),
        (start,),
        maximum_iterations=step_limit(solver, clock),
    )

    status = tf.where(unfinished(s), int(Status.MAX_STEPS), s.status)
    status = tf.where((status == 0) & ~_is_finite(s.y, per_sample), int(Status.NON_FINITE), status)
    return Integral(
        y1=trees.poison(status != 0, s.y),
        quadrature=trees.poison(tf.reduce_any(status != 0), s.quadrature),
        memories=s.memories,
        stats=Stats(s.num_evaluations, s.num_steps, s.num_rejected),
        status=status,
    )


def _first_evaluations(vector_field, y0, clock, solver, control, norm):
    """The rates at the start where they serve, the first step size, and how many evaluations these took."""
    adaptive_start = solver.adaptive and solver.first_step is None
    rate = pick(clock.rate, 0)
    k1, evaluations = (), 0
    if solver.tableau.fsal or adaptive_start:
        k1, evaluations = vector_field(clock.inside(0, clock.times[0]), y0, rate), 1
    if not adaptive_start:
        given = solver.first_step if solver.adaptive else solver.step_size or 0.0
        return k1, tf.fill(control, tf.cast(given, clock.stops.dtype)), evaluations

    def rate_of_change(reading, y):
        return trees.scale(rate, vector_field(clock.time(0, reading), y, rate).y)

    step_size = first_step_size(rate_of_change, y0, trees.scale(rate, k1.y), clock.end, solver.controller, norm)
    return k1, step_size, evaluations + 1


def _is_finite(x: Nest, per_sample: bool) -> tf.Tensor:
    flags = []
    for leaf in tf.nest.flatten(x):
        axes = list(range(1, leaf.shape.rank)) if per_sample else None
        flags.append(tf.reduce_all(tf.math.is_finite(leaf), axes))
    return tf.reduce_all(tf.stack(flags), axis=0)


def _evaluations_per_step(tableau) -> int:
    return tableau.num_stages - 1 if tableau.fsal else tableau.num_stages


def step_limit(solver: RungeKutta, clock: Clock) -> int | tf.Tensor:
    """How many steps a solve attempts at most."""
    if solver.num_steps is None:
        return solver.max_steps
    segments = clock.num_segments
    return solver.num_steps * (tf.shape(clock.rate)[0] if segments is None else segments)
