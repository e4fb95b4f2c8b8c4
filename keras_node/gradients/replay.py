"""Accepted steps, which a solve records and its gradient replays."""

from typing import NamedTuple

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, read, stack, write
from keras_node.clock import Clock, pick
from keras_node.gradients.custom_vjp import Gradients
from keras_node.interpolation import DenseOutput, Progress, interpolate
from keras_node.loop_start import step_limit
from keras_node.solve import Problem, solve_clock
from keras_node.solvers.rows import Rows
from keras_node.solvers.step import Rates, Step, rk_step, with_dense_stages
from keras_node.trees import Nest
from keras_node.vjp import vjp


class Record(NamedTuple):
    """What a forward solve keeps for its replay.

    Attributes:
        count: the number of steps that at least one sample accepted.
        stride: the number of steps from one kept state to the next.
        steps: the `Progress` of every step; each part has a new first axis. For samples that rejected the step, the
            length is zero.
        states: the states before the steps 0, `stride`, `2 * stride` and so on, with a new first axis.
    """

    count: tf.Tensor
    stride: tf.Tensor
    steps: Progress
    states: Nest


class Recorder:
    """An observer that keeps a `Record`.

    Args:
        clock: the clock of the solve.
        max_steps: the largest possible number of steps.
        slots: the largest number of states to keep.
    """

    def __init__(self, clock: Clock, max_steps: int | tf.Tensor, slots: int | tf.Tensor) -> None:
        self.clock = clock
        self.max_steps = max_steps
        self.slots = slots

    def start(self, y0: Nest) -> Record:
        nothing = tf.zeros_like(self.clock.end)
        none = tf.zeros_like(nothing, dtype=tf.int32)
        step = Progress(none, nothing, nothing, tf.zeros_like(none, dtype=tf.bool))
        steps = tf.nest.map_structure(lambda x: new_buffer(self.max_steps, x), step)
        states = tf.nest.map_structure(lambda y: new_buffer(self.slots + 1, y), y0)
        return Record(tf.constant(0), tf.constant(1), steps, states)

    def update(self, memory: Record, step: Step, progress: Progress) -> Record:
        count, stride, steps, states = memory
        # A sample that rejects its step does not move while others do.
        seen = progress._replace(
            segment=tf.broadcast_to(progress.segment, tf.shape(progress.start)),
            end=tf.where(progress.accepted, progress.end, progress.start),
        )
        steps = tf.nest.map_structure(lambda buffer, x: write(buffer, count, x), steps, seen)
        stride, states = tf.while_loop(
            lambda stride, _: count == stride * self.slots,
            lambda stride, states: (2 * stride, self._thinned(states)),
            (stride, states),
            maximum_iterations=1,
        )
        # Every state is written. The next one overwrites a state that is not kept.
        slot = (count + stride - 1) // stride
        states = tf.nest.map_structure(lambda buffer, y: write(buffer, slot, y), states, step.y0)
        return Record(count + tf.cast(tf.reduce_any(progress.accepted), tf.int32), stride, steps, states)

    def result(self, memory: Record) -> Record:
        """Returns the record with tensors in place of its buffers."""
        steps, states = tf.nest.map_structure(stack, (memory.steps, memory.states))
        return memory._replace(steps=steps, states=states)

    def _thinned(self, buffers: Nest) -> Nest:
        """Moves every second state to the front."""

        def move(i: tf.Tensor, buffers: Nest) -> tuple[tf.Tensor, Nest]:
            return i + 1, tf.nest.map_structure(lambda buffer: write(buffer, i, read(buffer, 2 * i)), buffers)

        return tf.while_loop(lambda i, _: 2 * i < self.slots, move, (1, buffers))[1]


class Replay:
    """The accepted steps of a solve, as functions of the state, the times and the parameters.

    Args:
        problem: the problem that was solved.
        record: the record of the solve.
        capacity: the largest possible number of states from one kept state to the next.
    """

    def __init__(self, problem: Problem, record: Record, capacity: int | tf.Tensor) -> None:
        self.problem = problem
        self.record = record
        self.capacity = capacity
        self.tableau = problem.solver.tableau
        self.dense = problem.ts.shape[0] != 2

    def step(
        self,
        n: tf.Tensor,
        y: Nest,
        params: list[tf.Tensor],
        clock: Clock,
        num_derivatives: int = 0,
        known_stages: tf.Tensor | None = None,
    ) -> tuple[Step, Progress]:
        """Computes the accepted step number `n` from the state `y`."""
        progress = tf.nest.map_structure(lambda x: tf.gather(x, n), self.record.steps)
        segment = clock.segment(progress.segment)
        constant_field = self.problem._replace(params=params).constant_field
        step = rk_step(
            self.problem.forward_solver,
            lambda t, y: Rates(self.problem.vector_field(segment.inside(t), y, params)),
            t=segment.time(progress.start),
            dt=tf.multiply(progress.length, segment.speed),
            y0=y,
            last_rate=self.dense,
            constant_field=constant_field and constant_field.inside(segment),
            num_derivatives=num_derivatives,
            known_stages=known_stages,
        )
        return step, progress

    def states(self, y0: Nest, ts: tf.Tensor, params: list[tf.Tensor]) -> Nest:
        """Computes the states at `ts` in one loop over all steps, which ordinary backpropagation can differentiate."""
        clock, readings = solve_clock(self.problem._replace(y0=y0, ts=ts))
        output = DenseOutput(self.problem.forward_solver, readings) if self.dense else None
        limit = step_limit(self.problem.forward_solver, clock)

        def body(n: tf.Tensor, y: Nest, memory: Nest) -> tuple[tf.Tensor, Nest, Nest]:
            step, progress = self.step(n, y, params, clock, num_derivatives=2)
            if output is None:
                return n + 1, step.y1, memory
            # The loop repeats a step for each state that it writes, because XLA cannot differentiate a loop inside a
            # loop twice.
            stays = tf.reduce_any(output.due(memory, progress))
            y = trees.where(stays, y, step.y1)
            step, memory = output.prepare(memory, step, progress)
            return n + tf.cast(~stays, tf.int32), y, output.emit(memory, step, progress)

        _, y1, memory = tf.while_loop(
            lambda n, *_: n < self.record.count,
            body,
            (0, y0, () if output is None else output.start(y0)),
            maximum_iterations=limit if output is None else limit + output.size,
        )
        if output is not None:
            return output.result(memory, y0)
        return tf.nest.map_structure(lambda a, b: tf.stack([a, b]), y0, y1)

    def gradient(self, dys: Nest) -> tuple[Gradients, tf.Tensor]:
        """Computes the gradients of `y0`, `ts` and `params`, step by step from the last to the first.

        Returns:
            The gradients, and the number of evaluations in which replayed steps differ: those of Newton's method, or at
            further stages of the dense output.
        """
        ts, params = self.problem.ts, self.problem.params
        times_vary = self.problem.times_vary
        with tf.GradientTape(watch_accessed_variables=False) as clock_tape:
            clock_tape.watch(ts)
            clock, readings = solve_clock(self.problem)
        timing: tuple[tf.Tensor, ...] = (clock.times, clock.speed, readings) if times_vary else ()
        sources = self.problem.vector_field.sources(params)

        def through_step(n: tf.Tensor, y: Nest, known_stages: tf.Tensor | None, total: tuple) -> tuple:
            adjoint, dparams, dtiming, written, evaluations = total
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tf.nest.flatten((y, sources, timing[:2])))
                step, progress = self.step(n, y, params, clock, 1, known_stages)
                if self.dense:
                    needed = tf.reduce_any(_is_due(readings, progress, written))
                    step = with_dense_stages(self.tableau, step, needed)
                    evaluations = evaluations + len(self.tableau.a_dense) * tf.cast(needed, tf.int32)
            parts = (step.y1, [rates.y for rates in step.k], step.dt) if self.dense else step.y1
            cotangent, direct = adjoint, tf.nest.map_structure(tf.zeros_like, y)
            dreadings = dtiming[2:]
            if self.dense:
                nothing = tf.nest.map_structure(tf.zeros_like, parts)
                cotangent, direct, dreadings, written = self._through_outputs(
                    step, progress, readings, dys, (adjoint, *nothing[1:]), direct, dreadings, written
                )
            dy, dstep, dclock = vjp(tape, parts, (y, sources, timing[:2]), cotangent)
            dtiming = (*trees.add(dtiming[:2], dclock), *dreadings)
            return trees.add(dy, direct), trees.add(dparams, dstep), dtiming, written, evaluations

        def through_stretch(stretch: tf.Tensor, total: tuple) -> tuple[tf.Tensor, tuple]:
            first = stretch * self.record.stride
            length = tf.minimum(self.record.stride, self.record.count - first)
            y = tf.nest.map_structure(lambda states: tf.gather(states, stretch), self.record.states)
            kept = tf.nest.map_structure(lambda a: new_buffer(self.capacity + 1, a), y)
            # To solve for the stages of an implicit method is far more work than to keep them.
            stages = new_buffer(self.capacity, self._no_stages(y)) if self.tableau.implicit else ()

            def again(i: tf.Tensor, y: Nest, kept: Nest, stages: Nest, evaluations: tf.Tensor) -> tuple:
                step, _ = self.step(first + i, y, params, clock)
                kept = tf.nest.map_structure(lambda buffer, a: write(buffer, i + 1, a), kept, step.y1)
                if step.convergence is not None:
                    stages = write(stages, i, step.convergence.stages)
                    evaluations = evaluations + tf.reduce_max(step.convergence.num_iterations)
                return i + 1, step.y1, kept, stages, evaluations

            def back(i: tf.Tensor, total: tuple) -> tuple[tf.Tensor, tuple]:
                y = tf.nest.map_structure(lambda buffer: read(buffer, i), kept)
                return i - 1, through_step(first + i, y, read(stages, i) if self.tableau.implicit else None, total)

            last = length if self.tableau.implicit else length - 1
            _, _, kept, stages, evaluations = tf.while_loop(
                lambda i, *_: i < last, again, (0, y, kept, stages, total[-1])
            )
            _, total = tf.while_loop(lambda i, _: i >= 0, back, (length - 1, (*total[:-1], evaluations)))
            return stretch - 1, total

        # With two times, the last state is the end of the last step. With more, all states come from the dense output.
        last = tf.nest.map_structure(lambda d: tf.zeros_like(d[-1]) if self.dense else d[-1], dys)
        written = tf.zeros_like(readings[0], dtype=tf.int32) + tf.shape(readings)[0] - 1 if self.dense else ()
        zeros = tf.nest.map_structure(tf.zeros_like, (params, timing))
        num_stretches = (self.record.count + self.record.stride - 1) // self.record.stride
        _, (adjoint, dparams, dtiming, _, evaluations) = tf.while_loop(
            lambda stretch, _: stretch >= 0,
            through_stretch,
            (num_stretches - 1, (last, *zeros, written, 0)),
            parallel_iterations=1,  # otherwise the states of several stretches would be in memory at once
        )

        at_start = readings <= 0 if self.dense else tf.constant([True, False])
        adjoint = tf.nest.map_structure(lambda a, d: a + tf.reduce_sum(_select(at_start, d), 0), adjoint, dys)
        dts = vjp(clock_tape, (clock.times, clock.speed, readings), ts, dtiming) if times_vary else tf.zeros_like(ts)
        return (adjoint, dts, dparams), evaluations

    def _no_stages(self, y: Nest) -> tf.Tensor:
        """Zeros in place of the stages of a step."""
        rows = Rows(y, has_batch=self.problem.forward_solver.per_sample or self.problem.ts.shape.rank == 2).join(y)
        return tf.zeros_like(tf.stack([rows] * self.tableau.num_stages))

    def _through_outputs(
        self,
        step: Step,
        progress: Progress,
        readings: tf.Tensor,
        dys: Nest,
        cotangent: Nest,
        direct: Nest,
        dreadings: tuple[tf.Tensor, ...],
        written: tf.Tensor,
    ) -> tuple[Nest, Nest, tuple[tf.Tensor, ...], tf.Tensor]:
        """Adds the gradients of the requested states inside a step to the cotangents of the parts of this step."""

        def body(cotangent: Nest, direct: Nest, dreadings: tuple[tf.Tensor, ...], i: tf.Tensor) -> tuple:
            now, index = _is_due(readings, progress, i), tf.maximum(i, 0)
            theta = progress.fraction(pick(readings, index))
            # Copies, because a field may return the state itself, and one tensor has only one gradient.
            parts, y0 = tf.nest.map_structure(tf.identity, ((step.y1, [rates.y for rates in step.k], step.dt), step.y0))
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tf.nest.flatten((parts, y0, theta)))
                y1, k, dt = parts
                moved = step._replace(y0=y0, y1=y1, k=[Rates(rate) for rate in k], dt=dt)
                y = interpolate(self.tableau, moved, theta)
            dy = tf.nest.map_structure(lambda d: pick(d, index), dys)
            dy = trees.where(now, dy, tf.nest.map_structure(tf.zeros_like, dy))
            dparts, dy0, dtheta = vjp(tape, y, (parts, y0, theta), dy)
            if dreadings:
                moved = tf.math.divide_no_nan(dtheta, progress.length)
                dreadings = (
                    dreadings[0] + tf.one_hot(index, tf.shape(readings)[0], axis=0, dtype=moved.dtype) * moved,
                )
            return trees.add(cotangent, dparts), trees.add(direct, dy0), dreadings, i - tf.cast(now, tf.int32)

        return tf.while_loop(
            lambda *loop: tf.reduce_any(_is_due(readings, progress, loop[-1])),
            body,
            (cotangent, direct, dreadings, written),
        )


def _is_due(readings: tf.Tensor, progress: Progress, i: tf.Tensor) -> tf.Tensor:
    """Whether reading `i` lies in a step. Readings are taken from the last to the first."""
    return (i > 0) & (pick(readings, tf.maximum(i, 0)) > progress.start)


def _select(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns `x` where `mask` is true and zero elsewhere. The axes of `mask` are the first axes of `x`."""
    shape = tf.concat([tf.shape(mask), tf.ones([x.shape.rank - mask.shape.rank], tf.int32)], 0)
    return tf.where(tf.reshape(mask, shape), x, tf.zeros_like(x))
