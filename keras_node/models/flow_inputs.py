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
    if len(shape) == 0 or shape[-1] not in (event_dim, None):
        raise ValueError(f"`x` must be of shape (..., {event_dim}). Received: x.shape={tuple(shape)}")


def as_rows(x: Any, condition: Any, event_dim: int, dtype: str) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Returns vectors and their conditions with one batch axis each. The conditions broadcast against the vectors."""
    x = ops.convert_to_tensor(x, dtype)
    check_length(x.shape, event_dim)
    if condition is not None:
        condition = ops.convert_to_tensor(condition, dtype)
        features = condition.shape[-1]
        shape = tf.concat([tf.shape(x)[:-1], [features]], axis=0)
        condition = tf.reshape(tf.broadcast_to(condition, shape), (-1, features))
    return tf.reshape(x, (-1, event_dim)), condition


def _is_shape(x: list | tuple) -> bool:
    return all(d is None or isinstance(d, int) for d in x)
