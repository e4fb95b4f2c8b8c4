"""Times of observations: how much time passed since the last valid one, and whether the times are in order."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.control import last_valid
from keras_node.times import as_numbers


def elapsed_times(
    times: tf.Tensor, mask: tf.Tensor | None, start: tf.Tensor | None, backwards: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the time since the last valid step, `(batch, T)`, and the time of the last valid step, `(batch,)`.

    At the first valid step, it is the time since `start`, `(batch,)`. If there is no start, or if it is NaN, it is zero
    there. At masked steps it is zero too.
    """
    if backwards:
        times = ops.flip(times, axis=1)
        mask = None if mask is None else ops.flip(mask, axis=1)
    start = ops.full_like(times[:, :1], float("nan")) if start is None else start[:, None]
    known = ops.concatenate([start, times], axis=1)
    if mask is not None:
        known = last_valid(known, with_start(mask))
    previous = known[:, :-1]
    # Without a previous time the difference is `times - times`: zero, or NaN, so that a NaN among the times shows.
    elapsed = times - ops.where(ops.isnan(previous), times, previous)
    elapsed = elapsed if mask is None else ops.where(mask, elapsed, 0)
    return ops.flip(elapsed, axis=1) if backwards else elapsed, known[:, -1]


def with_start(mask: tf.Tensor) -> tf.Tensor:
    """Returns the mask with one more valid step, before the first."""
    return ops.concatenate([ops.ones_like(mask[:, :1]), mask], axis=1)  # ONNX cannot pad booleans


def check_order(ordered: tf.Tensor, times: tf.Tensor, layer: keras.Layer) -> list[Any]:
    """Raises if times decrease: at once or, in a graph, when the returned assertions run."""
    must = (
        "The times of a sample must be finite and must not decrease from one valid step to the next. Sort the "
        "observations of each sample by time, and mask the padding"
    )
    values = tf.get_static_value(ordered)
    if values is None:
        return [
            tf.debugging.Assert(tf.reduce_all(ordered), [f"{must}. Received, in layer {layer.name!r}: times =", times])
        ]
    if not values.all():
        sample = int(values.argmin())
        known = tf.get_static_value(times)
        received = "times that decrease or are not finite" if known is None else f"times={known[sample].tolist()}"
        raise ValueError(f"{must}. Received: {received} for sample {sample}, in layer {layer.name!r}")
    return []


def as_array(times: Any) -> Any:
    """Returns times that are numbers as an array, since Keras takes no lists here; other times stay as they are."""
    if isinstance(times, list | tuple) or (isinstance(times, np.ndarray) and times.dtype.kind not in "fiu"):
        known = as_numbers(times)  # refuses dates
        return np.asarray(times, "float64") if known is None else known
    return times


def check_steps(x: Any, layer: keras.Layer) -> None:
    """Raises for a ragged series, and for one without steps, because it has no last state."""
    if isinstance(x, tf.RaggedTensor):
        raise TypeError(
            "A batch of series must be a dense tensor: pad what is ragged, for example with `x.to_tensor()`, and mask "
            f"the padding. Received: a RaggedTensor of shape {tuple(x.shape)}, in layer {layer.name!r}"
        )
    shape = tf.TensorShape(getattr(x, "shape", None))
    if shape.rank is not None and shape.rank > 1 and shape[1] == 0:
        raise ValueError(
            "A series needs one step or more. Pad an empty series with a masked step. "
            f"Received: x.shape={tuple(shape)}, in layer {layer.name!r}"
        )
