"""The gradient of the discrete solution in constant memory: every step is undone and differentiated."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.buffers import stack
from keras_node.clock import Clock
from keras_node.gradients.custom_vjp import Gradients, differentiated_as, poisoned, solve_with_gradient
from keras_node.gradients.record import Record, new_steps, with_step
from keras_node.gradients.replay import Replay, is_due, select, through_outputs
from keras_node.interpolation import Progress
from keras_node.loop_start import step_limit
from keras_node.solution import Stats, Status
from keras_node.solve import Problem, Trajectory, add_gradient_at_start, solve, solve_clock
from keras_node.solvers.reversible import change, mixed_part, mixture
from keras_node.solvers.step import Rates, Step, rk_step, with_dense_stages
from keras_node.trees import Nest
from keras_node.vjp import vjp


@keras.saving.register_keras_serializable(package="keras_node")
class ReversibleAdjoint:
    """Computes the gradient by undoing every step, in memory that does not grow with the number of steps.

    The solve takes other steps than with the other gradients: reversible ones, made of two steps of the solver's
    explicit method. `z` is a second state, `z(t0) = y(t0)`, and `psi(t, dt, y)` is the change of a step of the method:

    `y[n+1] = c y[n] + (1 - c) z[n] + psi(t[n], dt, z[n])`

    `z[n+1] = z[n] - psi(t[n+1], -dt, y[n+1])`

    Their order is that of the method. From the state after a step follows the state before it. So the gradient goes
    through the steps from the last to the first, undoes each one and differentiates it. This is the gradient of the
    discrete solution, exact up to rounding, as if you backpropagated through the accepted steps. Step sizes count as
    constants. Only the times of the steps are kept, which is one number for each step, or one for each step and sample
    with per-sample steps.

    A forward solve takes twice the evaluations of the method, and its gradient twice those of the checkpointed adjoint.
    So choose this gradient if memory is what limits you; otherwise `keras_node.CheckpointedAdjoint` is faster. Undoing
    a step multiplies rounding errors by up to `1 / c`, so after `n` steps they may have grown by `c ** -n`: by 2.7 for
    a thousand steps with the default coupling, and by 22,000 for ten thousand. A second derivative replays all steps
    at once, in memory that grows with their number.

    The steps of the symplectic methods `leapfrog` and `yoshida4` can be undone as they are. With them there is no `z`,
    nothing costs twice, no rounding error grows, and this gradient is the default.

    Args:
        coupling: the number `c`, above 0 and at most 1. What is missing to 1 draws `y` and `z` together, which makes
            the solve stable where the field contracts. Defaults to `0.999`, as in the publication.

    Raises:
        ValueError: for a coupling out of range. When the solve begins, for an implicit method and for events.

    Example:
        >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=keras_node.ReversibleAdjoint())
        >>> layer(keras.ops.ones((3, 2))).shape
        TensorShape([3, 2])

    Reference:

        - McCallum & Foster (2024), "Efficient, Accurate and Stable Gradients for Neural ODEs", arXiv:2410.11648.
    """

    def __init__(self, coupling: float = 0.999) -> None:
        if not 0 < coupling <= 1:
            raise ValueError(f"`coupling` must be above 0 and at most 1. Received: coupling={coupling}")
        self.coupling = float(coupling)

    def __call__(self, problem: Problem) -> Trajectory:
        """Solves the problem with this gradient. The layers and `keras_node.odeint` call it."""
        if not problem.solver.tableau.symplectic:
            problem = problem._replace(coupling=self.coupling)
        clock, _ = solve_clock(problem._replace(ts=tf.stop_gradient(problem.ts)))
        has_companion = problem.coupling is not None
        recorder = _Recorder(clock, step_limit(problem.solver, clock), has_companion, problem.exported)

        def forward(problem: Problem) -> tuple[Trajectory, tuple]:
            trajectory, (memory,) = solve(problem, [recorder])
            steps = tf.nest.map_structure(stack, memory.steps)
            return trajectory, (memory._replace(steps=steps), trajectory.status)

        def backward(problem: Problem, memory: tuple, ys: Nest, dys: Nest) -> tuple[Gradients, Stats, tf.Tensor]:
            del ys
            record, status = memory
            return _backward(problem, record, status, dys)

        return add_gradient_at_start(problem, solve_with_gradient(problem, forward, backward))

    def get_config(self) -> dict[str, Any]:
        return {"coupling": self.coupling}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ReversibleAdjoint":
        return cls(**config)


class _Kept(NamedTuple):
    """What a forward solve keeps.

    Attributes:
        count: the number of steps that at least one sample accepted.
        steps: the `Progress` of every step; each part has a new first axis.
        last: the state after the last step and its companion, which is `()` for a symplectic method.
    """

    count: tf.Tensor
    steps: Progress
    last: tuple[Nest, Nest]


class _Recorder:
    """An observer that keeps a `_Kept`, with buffers in place of `steps`."""

    def __init__(self, clock: Clock, max_steps: int | tf.Tensor, has_companion: bool, exported: bool) -> None:
        self.clock = clock
        self.max_steps = max_steps
        self.has_companion = has_companion
        self.exported = exported

    def start(self, y0: Nest) -> _Kept:
        last = (y0, y0 if self.has_companion else ())
        return _Kept(tf.constant(0), new_steps(self.clock, self.max_steps, self.exported), last)

    def update(self, memory: _Kept, step: Step, progress: Progress) -> _Kept:
        steps, count = with_step(memory.steps, memory.count, progress)
        last = trees.where(progress.accepted, (step.y1, step.companion), memory.last)
        return _Kept(count, steps, last)


def _backward(problem: Problem, kept: _Kept, status: tf.Tensor, dys: Nest) -> tuple[Gradients, Stats, tf.Tensor]:
    """The gradients of `y0`, `ts` and `params`, which you can differentiate again: this replays all steps at once."""

    def step_by_step(*arguments: Nest) -> tuple[Gradients, tf.Tensor]:
        y0, ts, params, dys = arguments
        return _undo(problem._replace(y0=y0, ts=ts, params=params), kept, dys)

    def at_once(*arguments: Nest) -> tuple[Gradients, tf.Tensor]:
        y0, ts, params, dys = arguments
        sources = (y0, ts, problem.vector_field.sources(params))
        record = Record(kept.count, tf.constant(1), kept.steps, ())
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(sources))
            ys = Replay(problem._replace(y0=y0, ts=ts, params=params), record).states(y0, ts, params)
        return vjp(tape, ys, sources, dys), tf.constant(0)

    arguments = (problem.y0, problem.ts, problem.params, dys)
    gradients, further = differentiated_as(
        step_by_step, at_once, arguments, problem.vector_field.pure, jit_compile=False
    )
    tableau = problem.solver.tableau
    # A step is evaluated once to undo it and once to differentiate it. With a companion these are the same evaluations.
    stages = 2 * tableau.num_stages - int(tableau.fsal) * (1 if problem.ts.shape[0] != 2 else 2)
    stats = Stats.zeros()._replace(num_evaluations=stages * kept.count + further, num_steps=kept.count)
    # The forward solve has reported its failure already, and nothing is solved here that could fail.
    return poisoned(gradients, status), stats, tf.constant(int(Status.SUCCESS))


def _undo(problem: Problem, kept: _Kept, dys: Nest) -> tuple[Gradients, tf.Tensor]:
    """The gradients of `y0`, `ts` and `params`, from the last step to the first.

    Also returns the number of evaluations at further stages of the dense output, which not every step needs.
    """
    ts, params, solver, times_vary = problem.ts, problem.params, problem.solver, problem.times_vary
    tableau, dense = solver.tableau, problem.ts.shape[0] != 2
    with tf.GradientTape(watch_accessed_variables=False) as clock_tape:
        clock_tape.watch(ts)
        clock, readings = solve_clock(problem)
    timing: tuple[tf.Tensor, ...] = (clock.times, clock.speed, readings) if times_vary else ()
    sources = (problem.vector_field.sources(params), timing[:2])

    def step_from(n: tf.Tensor, y: Nest, backward: bool) -> tuple[Step, Progress]:
        """A step of the method over the place of step `n`, from its end if `backward`."""
        progress = tf.nest.map_structure(lambda x: tf.gather(x, n), kept.steps)
        segment = clock.segment(progress.segment)
        t, dt = segment.time(progress.start), tf.multiply(progress.length, segment.speed)
        step = rk_step(
            solver,
            lambda t, y: Rates(problem.vector_field(segment.inside(t), y, params)),
            tf.add(t, dt) if backward else t,
            tf.negative(dt) if backward else dt,
            y,
            last_rate=dense and not backward,
        )
        return step, progress

    def through_companion(n: tf.Tensor, state: tuple, adjoint: tuple, total: Nest) -> tuple[Nest, Nest, tuple, Nest]:
        """Undoes `z1 = z0 - psi(t1, -dt, y1)`."""
        (y1, z1), (dy1, dz1) = state, adjoint
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten((y1, sources)))
            step, _ = step_from(n, y1, backward=True)
            psi = change(tableau, step)
        dy, dsources = vjp(tape, psi, (y1, sources), trees.scale(-1.0, dz1))
        return trees.add(z1, psi), trees.add(dy1, dy), dz1, trees.add(total, dsources)

    def body(
        n: tf.Tensor, state: tuple, adjoint: tuple, total: Nest, dreadings: tuple, written: Nest, further: tf.Tensor
    ) -> tuple:
        if problem.coupling is None:
            start, dy1 = step_from(n, state[0], backward=True)[0].y1, adjoint[0]
        else:
            start, dy1, dz1, total = through_companion(n, state, adjoint, total)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten((start, sources)))
            step, progress = step_from(n, start, backward=False)
            if dense:
                needed = tf.reduce_any(is_due(readings, progress, written))
                step = with_dense_stages(tableau, step, needed)
                further = further + len(tableau.a_dense) * tf.cast(needed, tf.int32)
            psi = change(tableau, step)
        y0 = start
        if problem.coupling is not None:
            # `y1 = y0 + part * (z0 - y0) + psi`, where `part` is `1 - c`, or zero for a step of length zero.
            part = mixed_part(step.dt, problem.coupling)
            before = trees.each(tf.subtract, trees.each(tf.subtract, state[0], psi), trees.scale(part, start))
            y0 = trees.scale(1 / (1 - part), before)
            step = step._replace(y0=mixture(y0, start, step.dt, problem.coupling), y1=state[0])
        parts, cotangent = psi, dy1
        dmixture = dy1
        if dense:
            parts = (psi, [rates.y for rates in step.k], step.dt)
            nothing = tf.nest.map_structure(tf.zeros_like, (step.y1, parts[1], step.dt))
            (_, *cotangents), dstart, dreadings, written = through_outputs(
                tableau, step, progress, readings, dys, nothing, nothing[0], dreadings, written
            )
            cotangent, dmixture = (dy1, *cotangents), trees.add(dy1, dstart)
        dstart, dsources = vjp(tape, parts, (start, sources), cotangent)
        total = trees.add(total, dsources)
        if problem.coupling is None:
            return n - 1, (y0, ()), (trees.add(dmixture, dstart), ()), total, dreadings, written, further
        dz0 = trees.add(trees.add(dz1, dstart), trees.scale(part, dmixture))
        return n - 1, (y0, start), (trees.scale(1 - part, dmixture), dz0), total, dreadings, written, further

    # With two times, the last state is the end of the last step. With more, all states come from the dense output.
    last = tf.nest.map_structure(lambda d: tf.zeros_like(d[-1]) if dense else d[-1], dys)
    companion = () if problem.coupling is None else tf.nest.map_structure(tf.zeros_like, last)
    written = tf.zeros_like(readings[0], dtype=tf.int32) + tf.shape(readings)[0] - 1 if dense else ()
    total = (
        tf.nest.map_structure(tf.zeros_like, params),
        tf.nest.map_structure(tf.zeros_like, timing[:2]),
    )
    _, _, adjoint, (dparams, dclock), dreadings, _, further = tf.while_loop(
        lambda n, *_: n >= 0,
        body,
        (
            kept.count - 1,
            kept.last,
            (last, companion),
            total,
            tf.nest.map_structure(tf.zeros_like, timing[2:]),
            written,
            0,
        ),
    )
    # The solve begins with `z = y`.
    dy0 = adjoint[0] if problem.coupling is None else trees.add(*adjoint)
    at_start = readings <= 0 if dense else tf.constant([True, False])
    dy0 = tf.nest.map_structure(lambda a, d: a + tf.reduce_sum(select(at_start, d), 0), dy0, dys)
    dtiming = (*dclock, *dreadings)
    dts = vjp(clock_tape, (clock.times, clock.speed, readings), ts, dtiming) if times_vary else tf.zeros_like(ts)
    return (dy0, dts, dparams), further
