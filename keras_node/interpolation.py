"""Dense output: the solution between the ends of a step, at no further evaluation of the field."""

from math import comb
from typing import Any, NamedTuple

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, stack, write
from keras_node.clock import pick
from keras_node.solvers.step import Step
from keras_node.solvers.tableaus import ButcherTableau
from keras_node.trees import Nest


def interpolate(tableau: ButcherTableau, step: Step, theta: tf.Tensor) -> Nest:
    """The continuous extension `y(t + theta dt) = y0 + dt * sum_i b_i(theta) k_i`, theta in [0, 1].

    Reference: Hairer, Norsett & Wanner (1993), II.6.
    """
    basis = _bernstein_basis(theta, degree=len(tableau.b_bernstein[0]))
    weights = [
        sum(b * polynomial for b, polynomial in zip(row, basis, strict=True)) if any(row) else 0
        for row in tableau.b_bernstein
    ]
    increment = trees.weighted_sum(weights, [rates.y for rates in step.k])
    y = trees.add(step.y0, trees.scale(step.dt, increment))
    # The end of a step is known exactly, where the polynomial adds rounding; its derivatives are those to have.
    rounding = trees.stop_gradient(tf.nest.map_structure(tf.subtract, step.y1, y))
    return trees.add(y, trees.where(theta >= 1, rounding, tf.nest.map_structure(tf.zeros_like, y)))


def _bernstein_basis(theta: tf.Tensor, degree: int) -> list[tf.Tensor]:
    """The polynomials 1 to `degree`; the first one, 0, has no part in an increment."""
    # Products, since the gradient of a power is not defined at 0.
    from_start, to_end = [tf.ones_like(theta)], [tf.ones_like(theta)]
    for _ in range(degree):
        from_start.append(from_start[-1] * theta)
        to_end.append(to_end[-1] * (1 - theta))
    return [comb(degree, j) * from_start[j] * to_end[degree - j] for j in range(1, degree + 1)]


class Progress(NamedTuple):
    """An attempted step on the clock, in one of its segments.

    It goes from the reading `start` to `end`; `accepted` says whether it stands.
    """

    segment: tf.Tensor | int
    start: tf.Tensor
    end: tf.Tensor
    accepted: tf.Tensor

    @property
    def length(self) -> tf.Tensor:
        return tf.subtract(self.end, self.start)

    def fraction(self, reading: tf.Tensor) -> tf.Tensor:
        """The part of the step that has passed at a reading, 0 to 1."""
        return tf.math.divide_no_nan(reading - self.start, self.length)


class DenseOutput:
    """Collects the solution at given readings of the clock while a solve goes by.

    The memory that it keeps between steps is `(next, buffers)`: the number of states written, and for every leaf
    of the state a buffer of them. Several readings may fall into one step, and none into another.

    Args:
        tableau: the method, for its continuous extension.
        readings: `(T,)`, or `(T, batch)` where samples differ; `readings[0]` is the start.
    """

    def __init__(self, tableau: ButcherTableau, readings: tf.Tensor):
        self.tableau = tableau
        self.readings = readings
        self.size = readings.shape[0] if readings.shape[0] is not None else tf.shape(readings)[0]
        self.shared = readings.shape.rank == 1

    def start(self, y0: Nest) -> tuple[tf.Tensor, Any]:
        written = tf.ones_like(self.readings[0], dtype=tf.int32)
        buffers = tf.nest.map_structure(self._new_buffer, y0)
        return written, buffers

    def update(self, memory, step: Step, progress: Progress):
        return tf.while_loop(
            lambda *memory: tf.reduce_any(self.due(memory, progress)),
            lambda *memory: self.emit(memory, step, progress),
            memory,
            maximum_iterations=self.size,
        )

    def due(self, memory, progress: Progress) -> tf.Tensor:
        """Whether the next state lies in the step, `()`, or `(batch,)` where samples differ."""
        written, _ = memory
        reading = pick(self.readings, tf.minimum(written, self.size - 1))
        return (written < self.size) & (reading <= progress.end) & progress.accepted

    def emit(self, memory, step: Step, progress: Progress):
        """Writes one state, where it is due."""
        written, buffers = memory
        now = self.due(memory, progress)
        reading = pick(self.readings, tf.minimum(written, self.size - 1))
        y = interpolate(self.tableau, step, tf.where(now, progress.fraction(reading), 0))
        # What is not due goes where the next state will; after the last state there is room for it.
        buffers = tf.nest.map_structure(lambda buffer, leaf: self._write(buffer, written, leaf), buffers, y)
        return written + tf.cast(now, tf.int32), buffers

    def result(self, memory, y0: Nest) -> Nest:
        """The collected states; NaN at the times that a failed solve did not reach."""
        written, buffers = memory
        index = tf.range(self.size) if self.shared else tf.range(self.size)[:, None]
        # A time equal to the first may have no step go by: in a solve of length zero none is made.
        at_start = self.readings <= 0
        reached = index < written

        def leaf(buffer, first):
            states = stack(buffer)[: self.size]
            expand = tf.ones([states.shape.rank - at_start.shape.rank], tf.int32)
            starts, known = (tf.reshape(m, tf.concat([tf.shape(m), expand], 0)) for m in (at_start, reached))
            return tf.where(starts, first[None], tf.where(known, states, float("nan")))

        return tf.nest.map_structure(leaf, buffers, y0)

    def _new_buffer(self, leaf):
        if self.shared:
            # With the last one written it has them all, also where a solve fails before.
            return write(new_buffer(self.size + 1, leaf), self.size, leaf)
        return tf.zeros(tf.concat([[self.size + 1], tf.shape(leaf)], 0), leaf.dtype)

    def _write(self, buffer, row, value):
        if self.shared:
            return write(buffer, row, value)
        return tf.tensor_scatter_nd_update(buffer, tf.stack([row, tf.range(tf.size(row))], axis=1), value)
