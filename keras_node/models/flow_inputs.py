"""The inputs of a flow: vectors, and the conditions that may come with them."""

from typing import Any

import tensorflow as tf
from keras import ops


def split(inputs: Any) -> tuple:
    """Returns the vectors `x`, and the condition or `None`, of inputs or of their shapes."""
    if isinstance(inputs, dict):
        given, is_known = f"the keys {sorted(inputs)}", "x" in inputs and set(inputs) <= {"x", "condition"}
        parts = inputs.get("x"), inputs.get("condition")
    elif isinstance(inputs, list | tuple) and not _is_shape(inputs):
        given, is_known = f"length {len(inputs)}", len(inputs) == 2
        parts = tuple(inputs)
    else:
        return inputs, None
    if not is_known:
        raise ValueError(
            'A flow takes `x`, `(x, condition)`, or `{"x": x, "condition": condition}`. '
            f"Received: a {type(inputs).__name__} with {given}"
        )
    return parts


def check_length(shape: Any, event_dim: int) -> None:
    """Checks the shape of vectors."""
    if isinstance(shape, tf.TensorShape) and shape.rank is None:
        return  # Keras hides the rank if a model has seen several. Vectors of another length do not become rows.
    if len(shape) == 0 or shape[-1] not in (event_dim, None):
        raise ValueError(f"`x` must be of shape (..., {event_dim}). Received: x.shape={tuple(shape)}")


def check_features(condition: tuple) -> None:
    """Checks the shape of conditions of which each belongs to a sample, or whose number of features makes weights."""
    if not condition or condition[-1] is None:
        raise ValueError(
            "`condition` must be of shape (..., features) with a known number of features. One number for each sample, "
            f"such as a label, needs an axis of features: `condition[:, None]`. Received: condition.shape={condition}"
        )


def leading_axes(x: tf.TensorShape, condition: tf.TensorShape | None) -> tf.TensorShape:
    """Returns the axes before the last one, for which vectors and conditions of these shapes broadcast."""
    if condition is None:
        return x[:-1]
    try:
        if condition.rank == 0:
            raise ValueError
        return tf.broadcast_static_shape(x[:-1], condition[:-1])
    except ValueError as error:
        raise ValueError(
            "`condition` must be of shape (..., features), and its axes before the last one must broadcast with those "
            f"of `x`. Received: x.shape={tuple(x)}, condition.shape={tuple(condition)}"
        ) from error


def as_rows(x: Any, condition: Any, event_dim: int, dtype: str) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor]:
    """Returns vectors and their conditions with one batch axis each, and the shape that the vectors had.

    Vectors `(..., event_dim)` and conditions `(..., features)` broadcast against each other.
    """
    x = ops.convert_to_tensor(x, dtype)
    check_length(x.shape, event_dim)
    if condition is not None:
        condition = ops.convert_to_tensor(condition, dtype)
        if None in (x.shape.rank, condition.shape.rank):
            raise ValueError(
                "With a condition, a flow takes inputs of one rank only, because Keras hides their shapes after the "
                f"second: use a new model. Received: x.shape={x.shape}, condition.shape={condition.shape}"
            )
        shapes = x.shape[:-1], condition.shape[:-1]
        leading_axes(x.shape, condition.shape)
        features = tf.shape(condition)[-1] if condition.shape[-1] is None else condition.shape[-1]
        if not shapes[0].is_fully_defined() or shapes[0] != shapes[1]:
            axes = tf.broadcast_dynamic_shape(tf.shape(x)[:-1], tf.shape(condition)[:-1])
            x, condition = (tf.broadcast_to(a, tf.concat([axes, tf.shape(a)[-1:]], axis=0)) for a in (x, condition))
        condition = tf.reshape(condition, (-1, features))
    return tf.reshape(x, (-1, event_dim)), condition, tf.shape(x)


def _is_shape(x: list | tuple) -> bool:
    return all(d is None or isinstance(d, int) for d in x)
