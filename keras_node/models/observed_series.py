"""Batches of series, `(times, values, mask)` or `(times, values)`, prepared for an encoder and for a solve."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.control import is_observed, last_valid
from keras_node.layers.irregular_times import with_start
from keras_node.times import prepare_times, refuse_rounded_arrays


def prepare(series: Any, dtype: str, t0: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns times for a solve, values with zeros where none was observed, and a mask of what was observed."""
    if not isinstance(series, list | tuple) or len(series) not in (2, 3):
        raise ValueError(
            f"A batch of series must be a tuple `(times, values, mask)` or `(times, values)`. Received: {series!r}"
        )
    times = prepare_times(series[0], dtype)
    values, *masks = (ops.convert_to_tensor(x) for x in series[1:])
    check_shapes([tuple(x.shape) for x in (times, values, *masks)])
    values = ops.cast(values, dtype)
    observed = is_observed(values, masks[0] if masks else None)
    values = ops.where(observed, values, 0)
    if len(times.shape) == 2:
        # The time of a step without observations may be anything, and must not make a solve turn back.
        valid = with_start(ops.any(observed, axis=-1))
        times = last_valid(ops.pad(times, [(0, 0), (1, 0)], constant_values=t0), valid)[:, 1:]
    return times, values, observed


def check_shapes(shapes: Sequence) -> None:
    """Checks the shapes of times, values and the mask, if there is one."""
    if not _fit(shapes):
        raise ValueError(
            "A batch of series must be a tuple `(times, values, mask)` or `(times, values)`: `times` of shape "
            "(batch, T) or (T,), `values` (batch, T, features), and `mask` (batch, T) or (batch, T, features). "
            f"Received: data of shape {tuple(shapes)}"
        )


def _fit(shapes: Sequence) -> bool:
    if len(shapes) not in (2, 3) or not all(isinstance(shape, list | tuple) for shape in shapes):
        return False
    times, values, *masks = (tf.TensorShape(shape) for shape in shapes)
    if values.rank != 3:
        return False
    steps = values[:2]
    return any(times.is_compatible_with(shape) for shape in (steps, steps[1:])) and all(
        any(mask.is_compatible_with(shape) for shape in (steps, values)) for mask in masks
    )


def with_own_times(series: Any) -> Any:
    """Returns series whose shared times, `(T,)`, are repeated for each of them: Keras cuts batches of the first axis.

    What is not a tuple of two or three arrays, such as a data set, stays as it is.
    """
    if (
        not isinstance(series, list | tuple)
        or len(series) not in (2, 3)
        or not all(hasattr(x, "shape") for x in series)
    ):
        return series
    times, values, *mask = series
    refuse_rounded_arrays(times)
    check_shapes([tuple(x.shape) for x in series])
    return np.broadcast_to(times, values.shape[:2]) if len(times.shape) == 1 else times, values, *mask
