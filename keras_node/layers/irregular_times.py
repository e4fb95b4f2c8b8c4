"""Times of observations: what passed since the last valid one, and whether they are in order."""

from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.control import last_valid


def elapsed_times(times, mask, start, backwards):
    """The time at every step since the last valid one, `(batch, T)`, and the last valid time, `(batch,)`.

    The time is counted from `start`, `(batch,)`, before the first valid step. Where there is no start, or it is NaN,
    the first valid step is at zero. So are masked ones.
    """
    if backwards:
        times = ops.flip(times, axis=1)
        mask = None if mask is None else ops.flip(mask, axis=1)
    start = ops.full_like(times[:, :1], float("nan")) if start is None else start[:, None]
    known = ops.concatenate([start, times], axis=1)
    if mask is not None:
        known = last_valid(known, with_start(mask))
    previous = known[:, :-1]
    # A difference also where there is no previous time, so that a NaN among the times shows.
    elapsed = times - ops.where(ops.isnan(previous), times, previous)
    elapsed = elapsed if mask is None else ops.where(mask, elapsed, 0)
    return ops.flip(elapsed, axis=1) if backwards else elapsed, known[:, -1]


def with_start(mask):
    """The mask with a valid step before the first."""
    return ops.concatenate([ops.ones_like(mask[:, :1]), mask], axis=1)  # ONNX cannot pad booleans


def check_order(ordered, times, layer):
    """Raises for times that turn back: now, or in a graph when the returned assertions run."""
    must = "The times of a sample must be finite and must not decrease from one valid step to the next"
    values = tf.get_static_value(ordered)
    if values is None:
        return [tf.debugging.Assert(tf.reduce_all(ordered), [f"{must}. Layer {layer.name!r} received:", times])]
    if not values.all():
        sample = int(values.argmin())
        received = tf.get_static_value(times)
        received = "" if received is None else f": times={received[sample].tolist()}"
        raise ValueError(f"{must}. Layer {layer.name!r} received{received} for sample {sample}")
    return []


def as_array(times: Any) -> Any:
    """Times in a list as an array, in which Keras takes them; what has a shape stays as it is."""
    return np.asarray(times, "float64") if isinstance(times, list | tuple) else times


def check_steps(x, layer):
    """Refuses a series without steps, which has no last state."""
    shape = tf.TensorShape(getattr(x, "shape", None))
    if shape.rank is not None and shape.rank > 1 and shape[1] == 0:
        raise ValueError(f"A series needs one step or more. Layer {layer.name!r} received: x.shape={tuple(shape)}")
