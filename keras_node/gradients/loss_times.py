"""The times of a solve in the adjoint method: the loss that arrives at them, and their own gradient."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.clock import Clock, pick
from keras_node.solve import Problem
from keras_node.trees import Nest


def loss_by_stop(
    stops: tf.Tensor | None, clock: Clock, ys: Nest, dys: Nest
) -> tuple[Callable[[tf.Tensor, Nest], Nest], Callable[[tf.Tensor], Nest]]:
    """Finds the states and the gradients of the loss at the stops of a backward solve.

    Args:
        stops: the index of the stop at every time, from the last time to the first, or `None` if every time has its
            own stop.
        clock: the clock of the backward solve.
        ys: the states at `ts`.
        dys: the gradients of a loss with respect to them.

    Returns:
        Two functions. `state_at(i, y)` returns the forward solution at stop `i`, or `y` if no time of `ts` is there.
        `arriving(i)` returns the sum of the gradients at stop `i`, without the one at the first time. `i` is one index,
        or one for each sample.
    """
    last = tf.shape(tf.nest.flatten(ys)[0])[0] - 1
    if stops is None:
        return (
            lambda i, y: tf.nest.map_structure(lambda a: pick(a, last - i), ys),
            lambda i: tf.nest.map_structure(lambda d: pick(d, last - i), dys),
        )
    size = tf.shape(clock.stops)[0]
    number = tf.reshape(tf.range(last + 1), [-1] + [1] * (stops.shape.rank - 1)) + tf.zeros_like(stops)
    which = last - tf.maximum(_sum_by_stop(tf.math.unsorted_segment_max, number, stops, size), -1)
    later = tf.nest.map_structure(lambda d: tf.concat([d[:0:-1], tf.zeros_like(d[:1])], axis=0), dys)
    sums = tf.nest.map_structure(lambda d: _sum_by_stop(tf.math.unsorted_segment_sum, d, stops, size), later)

    def state_at(i: tf.Tensor, y: Nest) -> Nest:
        index = pick(which, i)
        known = tf.nest.map_structure(lambda a: pick(a, tf.minimum(index, last)), ys)
        return trees.where(index <= last, known, y)

    return state_at, lambda i: tf.nest.map_structure(lambda d: pick(d, i), sums)


def tells_apart(problem: Problem) -> bool:
    """Whether it is known before the solve that no two of several times coincide. True if there are only two."""
    if problem.numbers is None or problem.ts.shape[0] == 2:
        return problem.ts.shape[0] == 2
    elapsed = (problem.numbers - problem.numbers[0]).astype(problem.dtype.as_numpy_dtype)
    return bool(np.all(np.diff(elapsed, axis=0) != 0))


def time_gradient(problem: Problem, ys: Nest, dys: Nest, adjoint: Nest) -> tf.Tensor:
    """`dL/dts`. A later time moves its state along the field, and the first time moves the whole path."""
    times = problem.times

    def along_field(t: tf.Tensor, y: Nest, dy: Nest) -> tf.Tensor:
        rate = problem.vector_field(t, y, problem.params)
        products = tf.nest.map_structure(tf.multiply, dy, rate)
        axes = 1 if times.shape.rank == 2 else 0
        return tf.add_n([tf.reduce_sum(p, list(range(axes, p.shape.rank))) for p in tf.nest.flatten(products)])

    def at(i: int | tf.Tensor, states: Nest) -> Nest:
        return tf.nest.map_structure(lambda x: pick(x, i), states)

    later = tf.map_fn(
        lambda i: along_field(pick(times, i), at(i, ys), at(i, dys)),
        tf.range(1, tf.shape(times)[0]),
        fn_output_signature=tf.TensorSpec(times.shape[1:], times.dtype),
    )
    return tf.concat([-along_field(times[0], at(0, ys), adjoint)[None], later], axis=0)


@tf.custom_gradient
def unknown_derivative(
    ts: tf.Tensor, stops: tf.Tensor, matters: tf.Tensor, like: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple]]:
    """Zeros whose derivative is NaN with respect to times that coincide, where that matters.

    There is no step between such times. So a second derivative would miss how the adjoint changes if one of them moves.
    """

    def gradient(upstream: tf.Tensor) -> tuple:
        del upstream
        coincide = (stops[:0:-1] == stops[-2::-1]) & matters[:0:-1]
        if stops.shape.rank > ts.shape.rank:
            coincide = tf.reduce_any(coincide, axis=1)
        elif stops.shape.rank < ts.shape.rank:
            coincide = coincide[:, None]
        none = tf.zeros_like(coincide[:1])
        unknown = tf.concat([none, coincide], axis=0) | tf.concat([coincide, none], axis=0)
        return (
            tf.where(unknown, tf.constant(float("nan"), ts.dtype), tf.zeros_like(ts)),
            None,
            None,
            tf.zeros_like(like),
        )

    return tf.zeros_like(like), gradient


def _sum_by_stop(segment_sum: Callable[..., tf.Tensor], x: tf.Tensor, stops: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """The sum (or maximum) of `x` over the times at each stop. Samples may have their own stops."""
    if stops.shape.rank == 1:
        return segment_sum(x, stops, size)
    batch = tf.shape(stops)[1]
    sums = segment_sum(x, stops * batch + tf.range(batch), size * batch)
    return tf.reshape(sums, tf.concat([[size, batch], tf.shape(x)[2:]], axis=0))
