"""The accepted steps of a solve, replayed and differentiated."""

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, read, write
from keras_node.clock import Clock, pick
from keras_node.gradients.custom_vjp import Gradients
from keras_node.gradients.record import Record
from keras_node.interpolation import DenseOutput, Progress, interpolate
from keras_node.loop_start import step_limit
from keras_node.solve import Problem, solve_clock
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.reversible import reversible_step
from keras_node.solvers.rows import Rows
from keras_node.solvers.step import Rates, Step, rk_step, with_dense_stages
from keras_node.trees import Nest
from keras_node.vjp import vjp


class Replay:
    """The accepted steps of a solve, as functions of the state, the times and the parameters.

    Args:
        problem: the problem that was solved.
        record: the record of the solve.
        capacity: the largest possible number of states from one kept state to the next, which `gradient` needs.
    """

    def __init__(self, problem: Problem, record: Record, capacity: int | tf.Tensor = 0) -> None:
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
        companion: Nest = (),
    ) -> tuple[Step, Progress]:
        """Computes the accepted step number `n` from the state `y`, and from the companion of a reversible step."""
        progress = tf.nest.map_structure(lambda x: tf.gather(x, n), self.record.steps)
        segment = clock.segment(progress.segment)
        solver = self.problem.forward_solver

        def field(t: tf.Tensor, y: Nest) -> Rates:
            return Rates(self.problem.vector_field(segment.inside(t), y, params))

        t, dt = segment.time(progress.start), tf.multiply(progress.length, segment.speed)
        if self.problem.coupling is not None:
            return reversible_step(solver, field, t, dt, y, companion, self.problem.coupling), progress
        constant_field = self.problem._replace(params=params).constant_field
        step = rk_step(
            solver,
            field,
            t,
            dt,
            y,
            last_rate=self.dense,
            constant_field=constant_field and constant_field.inside(segment),
            num_derivatives=num_derivatives,
            known_stages=known_stages,
        )
        return step, progress

    def states(self, y0: Nest, ts: tf.Tensor, params: list[tf.Tensor]) -> Nest:
        """Computes the states at `ts` in one loop over all steps, which ordinary backpropagation can differentiate."""
        clock, readings = solve_clock(self.problem._replace(y0=y0, ts=ts))
        output = DenseOutput(self.problem.forward_solver, readings, exported=False) if self.dense else None
        limit = step_limit(self.problem.forward_solver, clock)

        def body(n: tf.Tensor, state: Nest, memory: Nest) -> tuple[tf.Tensor, Nest, Nest]:
            y, companion = state
            step, progress = self.step(n, y, params, clock, num_derivatives=2, companion=companion)
            if output is None:
                return n + 1, (step.y1, step.companion), memory
            # The loop repeats a step for each state that it writes, because XLA cannot differentiate a loop inside a
            # loop twice.
            stays = tf.reduce_any(output.due(memory, progress))
            state = trees.where(stays, state, (step.y1, step.companion))
            step, memory = output.prepare(memory, step, progress)
            return n + tf.cast(~stays, tf.int32), state, output.emit(memory, step, progress)

        _, (y1, _), memory = tf.while_loop(
            lambda n, *_: n < self.record.count,
            body,
            (0, (y0, () if self.problem.coupling is None else y0), () if output is None else output.start(y0)),
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
                    needed = tf.reduce_any(is_due(readings, progress, written))
                    step = with_dense_stages(self.tableau, step, needed)
                    evaluations = evaluations + len(self.tableau.a_dense) * tf.cast(needed, tf.int32)
            parts = (step.y1, [rates.y for rates in step.k], step.dt) if self.dense else step.y1
            cotangent, direct = adjoint, tf.nest.map_structure(tf.zeros_like, y)
            dreadings = dtiming[2:]
            if self.dense:
                nothing = tf.nest.map_structure(tf.zeros_like, parts)
                cotangent, direct, dreadings, written = through_outputs(
                    self.tableau, step, progress, readings, dys, (adjoint, *nothing[1:]), direct, dreadings, written
                )
            dy, dstep, dclock = vjp(tape, parts, (y, sources, timing[:2]), cotangent)
            dtiming = (*trees.add(dtiming[:2], dclock), *dreadings)
            return trees.add(dy, direct), trees.add(dparams, dstep), dtiming, written, evaluations

        count, stride, implicit = self.record.count, self.record.stride, self.tableau.implicit

        def body(n: tf.Tensor, kept: Nest, stages: Nest, total: tuple) -> tuple:
            """Differentiates step `n`. Where it is the last one of a stretch, computes the stretch again before."""
            stretch, i = n // stride, n % stride
            start = tf.nest.map_structure(lambda states: tf.gather(states, stretch), self.record.states)

            def again(j: tf.Tensor, y: Nest, kept: Nest, stages: Nest, evaluations: tf.Tensor) -> tuple:
                step, _ = self.step(stretch * stride + j, y, params, clock)
                kept = tf.nest.map_structure(lambda buffer, a: write(buffer, j, a), kept, step.y1)
                if step.convergence is not None:
                    stages = write(stages, j, step.convergence.stages)
                    evaluations = evaluations + tf.reduce_max(step.convergence.num_iterations)
                return j + 1, step.y1, kept, stages, evaluations

            # The state after the last step of a stretch is not needed, but its stages are.
            end = i + int(implicit)
            begin = tf.where((n == count - 1) | (i == stride - 1), 0, end)
            loop = (begin, start, kept, stages, total[-1])
            _, _, kept, stages, evaluations = tf.while_loop(lambda j, *_: j < end, again, loop)
            before = tf.nest.map_structure(lambda buffer: read(buffer, tf.maximum(i - 1, 0)), kept)
            known = read(stages, i) if implicit else None
            total = through_step(n, trees.where(i == 0, start, before), known, (*total[:-1], evaluations))
            return n - 1, kept, stages, total

        # With two times, the last state is the end of the last step. With more, all states come from the dense output.
        last = tf.nest.map_structure(lambda d: tf.zeros_like(d[-1]) if self.dense else d[-1], dys)
        written = tf.zeros_like(readings[0], dtype=tf.int32) + tf.shape(readings)[0] - 1 if self.dense else ()
        zeros = tf.nest.map_structure(tf.zeros_like, (params, timing))
        first = tf.nest.map_structure(lambda states: states[0], self.record.states)
        kept = tf.nest.map_structure(lambda a: new_buffer(self.capacity, a, exported=False), first)
        # To solve for the stages of an implicit method is far more work than to keep them.
        stages = new_buffer(self.capacity, self._no_stages(first), exported=False) if implicit else ()
        loop = (count - 1, kept, stages, (last, *zeros, written, 0))
        *_, (adjoint, dparams, dtiming, _, evaluations) = tf.while_loop(lambda n, *_: n >= 0, body, loop)

        at_start = readings <= 0 if self.dense else tf.constant([True, False])
        adjoint = tf.nest.map_structure(lambda a, d: a + tf.reduce_sum(select(at_start, d), 0), adjoint, dys)
        dts = vjp(clock_tape, (clock.times, clock.speed, readings), ts, dtiming) if times_vary else tf.zeros_like(ts)
        return (adjoint, dts, dparams), evaluations

    def _no_stages(self, y: Nest) -> tf.Tensor:
        """Zeros in place of the stages of a step."""
        rows = Rows(y, has_batch=self.problem.forward_solver.per_sample or self.problem.ts.shape.rank == 2).join(y)
        return tf.zeros_like(tf.stack([rows] * self.tableau.num_stages))


def through_outputs(
    tableau: ButcherTableau,
    step: Step,
    progress: Progress,
    readings: tf.Tensor,
    dys: Nest,
    cotangent: Nest,
    direct: Nest,
    dreadings: tuple[tf.Tensor, ...],
    written: tf.Tensor,
) -> tuple[Nest, Nest, tuple[tf.Tensor, ...], tf.Tensor]:
    """Adds the gradients of the requested states inside a step to the cotangents of the parts of this step.

    Args:
        tableau: the method.
        step: the step, from the last one to the first.
        progress: its place.
        readings: the readings of the requested states.
        dys: the gradients of these states.
        cotangent: the gradients of the parts of the step: `y1`, the rates at all stages, and `dt`.
        direct: the gradient of `y0` that does not flow through a part.
        dreadings: the gradient of the readings, or `()` if they need none.
        written: the index of the last reading that is not done yet.

    Returns:
        The new `cotangent`, `direct`, `dreadings` and `written`.
    """

    def body(cotangent: Nest, direct: Nest, dreadings: tuple[tf.Tensor, ...], i: tf.Tensor) -> tuple:
        now, index = is_due(readings, progress, i), tf.maximum(i, 0)
        theta = progress.fraction(pick(readings, index))
        # Copies, because a field may return the state itself, and one tensor has only one gradient.
        parts, y0 = tf.nest.map_structure(tf.identity, ((step.y1, [rates.y for rates in step.k], step.dt), step.y0))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten((parts, y0, theta)))
            y1, k, dt = parts
            moved = step._replace(y0=y0, y1=y1, k=[Rates(rate) for rate in k], dt=dt)
            y = interpolate(tableau, moved, theta)
        dy = tf.nest.map_structure(lambda d: pick(d, index), dys)
        dy = trees.where(now, dy, tf.nest.map_structure(tf.zeros_like, dy))
        dparts, dy0, dtheta = vjp(tape, y, (parts, y0, theta), dy)
        if dreadings:
            moved = tf.math.divide_no_nan(dtheta, progress.length)
            dreadings = (dreadings[0] + tf.one_hot(index, tf.shape(readings)[0], axis=0, dtype=moved.dtype) * moved,)
        return trees.add(cotangent, dparts), trees.add(direct, dy0), dreadings, i - tf.cast(now, tf.int32)

    return tf.while_loop(
        lambda *loop: tf.reduce_any(is_due(readings, progress, loop[-1])),
        body,
        (cotangent, direct, dreadings, written),
    )


def is_due(readings: tf.Tensor, progress: Progress, i: tf.Tensor) -> tf.Tensor:
    """Whether reading `i` lies in a step. Readings are taken from the last to the first."""
    return (i > 0) & (pick(readings, tf.maximum(i, 0)) > progress.start)


def select(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns `x` where `mask` is true and zero elsewhere. The axes of `mask` are the first axes of `x`."""
    return tf.where(trees.expand(mask, x.shape.rank), x, tf.zeros_like(x))
