"""Dense output: the solution between the ends of a step."""

from math import comb
from typing import NamedTuple

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import Buffer, new_buffer, stack, write
from keras_node.clock import pick
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Step, with_dense_stages
from keras_node.trees import Nest


class Memory(NamedTuple):
    """The memory of a `DenseOutput`.

    Attributes:
        written: the number of states written so far, `()`, or `(batch,)` if samples have their own readings.
        buffers: for every leaf of the state a buffer of states.
        num_evaluations: the number of evaluations at further stages, one value or one for each sample; `()` if the
            method has no further stages.
    """

    written: tf.Tensor
    buffers: Nest
    num_evaluations: Nest


def interpolate(tableau: ButcherTableau, step: Step, theta: tf.Tensor) -> Nest:
    """The continuous extension of a step at `theta`, a number between 0 and 1.

    `y(t + theta dt) = y0 + dt * sum_i b_i(theta) k_i`

    Reference: Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", II.6.
    """
    basis = _bernstein_basis(theta, degree=len(tableau.b_bernstein[0]))
    weights = [
        sum(b * polynomial for b, polynomial in zip(row, basis, strict=True)) if any(row) else 0
        for row in tableau.b_bernstein
    ]
    increment = trees.weighted_sum(weights, [rates.y for rates in step.k])
    y = trees.add(step.y0, trees.scale(step.dt, increment))
    # At the end of a step the state is known, while the polynomial has a rounding error. Take the value of the state
    # and the derivatives of the polynomial.
    rounding = trees.stop_gradient(tf.nest.map_structure(tf.subtract, step.y1, y))
    return trees.add(y, trees.where(theta >= 1, rounding, tf.nest.map_structure(tf.zeros_like, y)))


def _bernstein_basis(theta: tf.Tensor, degree: int) -> list[tf.Tensor]:
    """The Bernstein polynomials 1 to `degree`. Polynomial 0 is not part of an increment."""
    # Products are used because the gradient of a power is not defined at 0.
    from_start, to_end = [tf.ones_like(theta)], [tf.ones_like(theta)]
    for _ in range(degree):
        from_start.append(from_start[-1] * theta)
        to_end.append(to_end[-1] * (1 - theta))
    return [comb(degree, j) * from_start[j] * to_end[degree - j] for j in range(1, degree + 1)]


class Progress(NamedTuple):
    """An attempted step, as seen by the clock.

    Attributes:
        segment: the index of its segment.
        start, end: the readings at its ends.
        accepted: whether the step was accepted.
    """

    segment: tf.Tensor | int
    start: tf.Tensor
    end: tf.Tensor
    accepted: tf.Tensor

    @property
    def length(self) -> tf.Tensor:
        """The length of the step on the clock."""
        return tf.subtract(self.end, self.start)

    def fraction(self, reading: tf.Tensor) -> tf.Tensor:
        """The part of the step that has passed at a reading, from 0 to 1."""
        return tf.math.divide_no_nan(reading - self.start, self.length)


class DenseOutput:
    """An observer that collects the solution at given readings of the clock.

    One step may contain several readings, and another step none.

    Args:
        solver: the method, whose continuous extension is used.
        readings: `(T,)`, or `(T, batch)` if samples have their own. `readings[0]` is the start.
        exported: whether an exported model may contain the solve (see `new_buffer`).
    """

    def __init__(self, solver: RungeKutta, readings: tf.Tensor, exported: bool) -> None:
        self.tableau = solver.tableau
        self.per_sample = solver.per_sample
        self.readings = readings
        self.size = readings.shape[0] if readings.shape[0] is not None else tf.shape(readings)[0]
        self.shared = readings.shape.rank == 1
        self.exported = exported

    def start(self, y0: Nest) -> Memory:
        written = tf.ones_like(self.readings[0], dtype=tf.int32)
        buffers = tf.nest.map_structure(self._new_buffer, y0)
        evaluations = tf.zeros_like(written) if self.per_sample else tf.constant(0)
        return Memory(written, buffers, evaluations if self.tableau.a_dense else ())

    def update(self, memory: Memory, step: Step, progress: Progress) -> Memory:
        step, memory = self.prepare(memory, step, progress)
        (memory,) = trees.while_loop(
            lambda memory: tf.reduce_any(self.due(memory, progress)),
            lambda memory: (self.emit(memory, step, progress),),
            (memory,),
            maximum_iterations=self.size,
        )
        return memory

    def prepare(self, memory: Memory, step: Step, progress: Progress) -> tuple[Step, Memory]:
        """Computes the further stages of a step, if a state is due and the method has any."""
        if not self.tableau.a_dense:
            return step, memory
        due = self.due(memory, progress)
        needed = tf.reduce_any(due)
        more = len(self.tableau.a_dense) * tf.cast(due if self.per_sample else needed, tf.int32)
        memory = memory._replace(num_evaluations=memory.num_evaluations + more)
        return with_dense_stages(self.tableau, step, needed), memory

    def due(self, memory: Memory, progress: Progress) -> tf.Tensor:
        """Whether the next state lies in the step, `()`, or `(batch,)` if samples differ."""
        written = memory.written
        reading = pick(self.readings, tf.minimum(written, self.size - 1))
        return (written < self.size) & (reading <= progress.end) & progress.accepted

    def emit(self, memory: Memory, step: Step, progress: Progress) -> Memory:
        """Writes one state if it is due."""
        written, buffers, _ = memory
        now = self.due(memory, progress)
        reading = pick(self.readings, tf.minimum(written, self.size - 1))
        y = interpolate(self.tableau, step, tf.where(now, progress.fraction(reading), 0))
        # A state that is not due is written too, and the next one overwrites it. The buffer has one more entry for the
        # case that none follows.
        buffers = tf.nest.map_structure(lambda buffer, leaf: self._write(buffer, written, leaf), buffers, y)
        return memory._replace(written=written + tf.cast(now, tf.int32), buffers=buffers)

    def result(self, memory: Memory, y0: Nest, y1: Nest = None) -> Nest:
        """The collected states. At times that the solve did not reach they are `y1`, by default NaN."""
        written, buffers, _ = memory
        index = tf.range(self.size) if self.shared else tf.range(self.size)[:, None]
        # Times equal to the first need this: a solve of length zero makes no step that would write them.
        at_start = self.readings <= 0
        reached = index < written

        def leaf(buffer: Buffer, first: tf.Tensor, rest: tf.Tensor) -> tf.Tensor:
            states = stack(buffer)[: self.size]
            starts, known = (trees.expand(m, states.shape.rank) for m in (at_start, reached))
            return tf.where(starts, first[None], tf.where(known, states, rest))

        if y1 is None:
            y1 = tf.nest.map_structure(lambda y: tf.constant(float("nan"), y.dtype), y0)
        return tf.nest.map_structure(leaf, buffers, y0, y1)

    def _new_buffer(self, leaf: tf.Tensor) -> Buffer:
        if self.shared:
            # The last entry is written now, so that the buffer has all entries even if the solve fails before it.
            return write(new_buffer(self.size + 1, leaf, self.exported), self.size, leaf)
        return tf.zeros(tf.concat([[self.size + 1], tf.shape(leaf)], 0), leaf.dtype)

    def _write(self, buffer: Buffer, row: tf.Tensor, value: tf.Tensor) -> Buffer:
        if self.shared:
            return write(buffer, row, value)
        return tf.tensor_scatter_nd_update(buffer, tf.stack([row, tf.range(tf.size(row))], axis=1), value)
