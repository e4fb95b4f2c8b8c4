"""Arithmetic on nests of tensors, the form in which a state travels.

A time-like value is a scalar, or has shape `(batch,)` where every sample has its own; `align` gives it
the trailing axes that it needs to broadcast against a state of shape `(batch, ...)`.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

Nest = Any  # a tensor, or a tuple, list or dict of nests


def align(time: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes `(batch,)` to `(batch, 1, ..., 1)` with the rank of `like`; a scalar stays one."""
    if time.shape.rank == 0 or like.shape.rank == 1:
        return time
    return tf.reshape(time, [-1] + [1] * (like.shape.rank - 1))


def where(condition: tf.Tensor, x: Nest, y: Nest) -> Nest:
    """Selects leaf by leaf; `condition` is a scalar or has shape `(batch,)`."""
    return tf.nest.map_structure(lambda a, b: tf.where(align(condition, a), a, b), x, y)


def scale(factor: tf.Tensor | float, x: Nest) -> Nest:
    """`factor * x`, the factor a number, a scalar or of shape `(batch,)`."""
    factor = tf.convert_to_tensor(factor) if not isinstance(factor, numbers.Number) else factor
    if isinstance(factor, numbers.Number):
        return tf.nest.map_structure(lambda a: factor * a, x)
    return tf.nest.map_structure(lambda a: align(factor, a) * a, x)


def add(x: Nest, y: Nest) -> Nest:
    """Sum, leaf by leaf."""
    return tf.nest.map_structure(tf.add, x, y)


def weighted_sum(weights: Sequence[float | tf.Tensor], xs: Sequence[Nest]) -> Nest:
    """`sum_i weights[i] * xs[i]`; a weight that is the number zero costs nothing."""
    pairs = [(w, x) for w, x in zip(weights, xs, strict=True) if not _is_zero(w)]
    if not pairs:
        return tf.nest.map_structure(tf.zeros_like, xs[0])
    total = scale(*pairs[0])
    for pair in pairs[1:]:
        total = add(total, scale(*pair))
    return total


def stop_gradient(x: Nest) -> Nest:
    """Values that are constants of differentiation."""
    return tf.nest.map_structure(tf.stop_gradient, x)


def poison(failed: tf.Tensor, x: Nest) -> Nest:
    """NaN in place of every value that a failed solve gave."""

    def leaf(a):
        usable = tf.cast(~failed, a.dtype)
        # One or NaN. A selection between the two would be a sum of products for a converter, and NaN for all.
        return align(usable / usable, a) * a

    return tf.nest.map_structure(leaf, x)


def _is_zero(weight) -> bool:
    return isinstance(weight, numbers.Number) and weight == 0
