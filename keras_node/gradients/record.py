"""What a forward solve keeps of its accepted steps for its gradient."""

from typing import NamedTuple

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, read, stack, write
from keras_node.clock import Clock
from keras_node.interpolation import Progress
from keras_node.solvers.step import Step
from keras_node.trees import Nest


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


def new_steps(clock: Clock, max_steps: int | tf.Tensor, exported: bool) -> Progress:
    """Buffers for the `Progress` of every accepted step of a solve, which an exported model may contain or not."""
    nothing = tf.zeros_like(clock.end)
    none = tf.zeros_like(nothing, dtype=tf.int32)
    step = Progress(none, nothing, nothing, tf.zeros_like(none, dtype=tf.bool))
    return tf.nest.map_structure(lambda x: new_buffer(max_steps, x, exported), step)


def with_step(steps: Progress, count: tf.Tensor, progress: Progress) -> tuple[Progress, tf.Tensor]:
    """Writes an attempted step. Returns the buffers and the new count; the next step overwrites a rejected one."""
    # A sample that rejects its step does not move while others do.
    seen = progress._replace(
        segment=tf.broadcast_to(progress.segment, tf.shape(progress.start)),
        end=tf.where(progress.accepted, progress.end, progress.start),
    )
    steps = tf.nest.map_structure(lambda buffer, x: write(buffer, count, x), steps, seen)
    return steps, count + tf.cast(tf.reduce_any(progress.accepted), tf.int32)


class Recorder:
    """An observer that keeps a `Record`.

    Args:
        clock: the clock of the solve.
        max_steps: the largest possible number of steps.
        slots: the largest number of states to keep.
        exported: whether an exported model may contain the solve (see `new_buffer`).
    """

    def __init__(self, clock: Clock, max_steps: int | tf.Tensor, slots: int | tf.Tensor, exported: bool) -> None:
        self.clock = clock
        self.max_steps = max_steps
        self.slots = slots
        self.exported = exported

    def start(self, y0: Nest) -> Record:
        steps = new_steps(self.clock, self.max_steps, self.exported)
        states = tf.nest.map_structure(lambda y: new_buffer(self.slots + 1, y, self.exported), y0)
        return Record(tf.constant(0), tf.constant(1), steps, states)

    def update(self, memory: Record, step: Step, progress: Progress) -> Record:
        count, stride, steps, states = memory
        steps, new_count = with_step(steps, count, progress)
        full = count == stride * self.slots
        # If there is no slot left, every second state moves to the front.
        _, states = tf.while_loop(
            lambda i, _: 2 * i < self.slots, self._with_moved, (tf.where(full, 1, self.slots), states)
        )
        stride = tf.where(full, 2 * stride, stride)
        # Every state is written. The next one overwrites a state that is not kept.
        slot = (count + stride - 1) // stride
        states = tf.nest.map_structure(lambda buffer, y: write(buffer, slot, y), states, step.y0)
        return Record(new_count, stride, steps, states)

    def result(self, memory: Record) -> Record:
        """Returns the record with tensors in place of its buffers."""
        steps, states = tf.nest.map_structure(stack, (memory.steps, memory.states))
        return memory._replace(steps=steps, states=states)

    def _with_moved(self, i: tf.Tensor, states: Nest) -> tuple[tf.Tensor, Nest]:
        """Moves state `2 * i` to place `i`."""
        return i + 1, tf.nest.map_structure(lambda buffer: write(buffer, i, read(buffer, 2 * i)), states)


class LastSteps:
    """An observer that keeps the lengths of the last accepted step and of the one before it.

    Args:
        like: a time, or with per-sample steps one for each sample. Its shape and dtype are those of the lengths.
    """

    def __init__(self, like: tf.Tensor) -> None:
        self.like = like

    def start(self, y0: Nest) -> tuple[tf.Tensor, tf.Tensor]:
        del y0
        zero = tf.zeros_like(self.like)
        return zero, zero

    def update(
        self, memory: tuple[tf.Tensor, tf.Tensor], step: Step, progress: Progress
    ) -> tuple[tf.Tensor, tf.Tensor]:
        del step
        return trees.where(progress.accepted, (progress.length, memory[0]), memory)
