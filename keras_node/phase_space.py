"""States that hold positions, and as many velocities or momenta."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from keras_node import trees
from keras_node.trees import Nest


def halves(y: Nest) -> Any:
    """Returns the positions, and their velocities or momenta: two leaves, or the two halves of the last axis."""
    if isinstance(y, list | tuple):
        if len(y) == 2:
            return y
    elif not isinstance(y, dict) and len(y.shape) and y.shape[-1] is not None and y.shape[-1] % 2 == 0:
        return ops.split(y, 2, axis=-1)
    raise ValueError(
        "The state must hold positions and as many velocities or momenta, either as the two halves of its last axis or "
        f"as a tuple of two tensors. Received: {tf.nest.map_structure(lambda x: tuple(x.shape), y)}"
    )


def joined(first: tf.Tensor, second: tf.Tensor, like: Nest) -> Nest:
    """Joins two halves in the same form as the state `like`."""
    return type(like)([first, second]) if isinstance(like, list | tuple) else ops.concatenate([first, second], axis=-1)


def only(half: int, rates: Nest, y: Nest) -> Nest:
    """Returns the rates of change of a state, with zeros in place of the half that is not the number `half`."""
    parts = list(halves(rates))
    # These are zeros like the state, so that nothing needs the other half of the rates, and a graph leaves it out.
    parts[1 - half] = trees.each(tf.zeros_like, halves(y)[1 - half])
    return joined(parts[0], parts[1], y)


def is_separable(rates: Callable[[Nest], Nest], y: Nest, per_sample: bool) -> tf.Tensor:
    """Whether each half of the rates depends on the other half of the state only, as a symplectic method needs.

    The answer comes from two changes of the state, by about a tenth of its size: a half of the rates must not notice a
    change of the same half of the state. Rounding may.

    Args:
        rates: the vector field as a function of the state.
        y: a state.
        per_sample: whether to return an answer for each sample.
    """
    before, answers = halves(rates(y)), []
    for half in (0, 1):
        changed = list(halves(y))
        changed[half] = trees.each(lambda a: 1.1 * a + 0.1, changed[half])
        after = halves(rates(joined(changed[0], changed[1], y)))[half]

        def same(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
            first = int(per_sample)
            axes = list(range(first, a.shape.rank))
            size = tf.reduce_max(tf.abs(a) + tf.abs(b), axes)
            # A rate that is not finite says nothing: the field may not be defined at the changed state.
            differs = tf.reduce_max(tf.abs(a - b), axes) > 100 * float(np.finfo(a.dtype.as_numpy_dtype).eps) * size
            return ~differs | ~tf.math.is_finite(size)

        answers += tf.nest.flatten(trees.each(same, before[half], after))
    return tf.reduce_all(tf.stack(answers), axis=0)
