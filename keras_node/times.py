"""Times as a user passes them: numbers, arrays, tensors and variables, in a precision that tells them apart.

In float32, seconds since 1970 have no fractions. This is why times keep the precision in which they arrive. A solve
works with their differences, which are formed first and then rounded to the precision of the state.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras import ops

# What an argument for times may be; a sequence may contain tensors.
Times: TypeAlias = tf.Tensor | tf.Variable | np.ndarray | Sequence


def as_numbers(times: Times) -> np.ndarray | None:
    """Returns times that are numbers, or arrays of them, as float64, and `None` for times that may need a gradient."""
    if any(_is_tensor(t) for t in tf.nest.flatten(times)):
        return None
    return np.asarray(times, dtype="float64")


def prepare_times(times: Times, dtype: tf.DType | str) -> tf.Tensor:
    """Returns times as a tensor of `dtype`, or of a higher precision that tells them apart.

    Args:
        times: numbers, an array, a tensor, a variable, or a list of these.
        dtype: the precision of the state.

    Returns:
        A tensor of `dtype`. Its precision is that of the times if this is higher, and float64 for integers, and for
        numbers that are different but would be equal in `dtype`.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    known = as_numbers(times)
    if known is not None:
        rounded = known.astype(dtype)
        axes = range(known.ndim)
        same = all(np.array_equal(np.diff(rounded, axis=i) == 0, np.diff(known, axis=i) == 0) for i in axes)
        return tf.constant(rounded if same else known)
    if not _is_tensor(times):
        leaves = tf.nest.flatten(times)
        highest = functools.reduce(_higher, [t.dtype for t in leaves if _is_tensor(t)], dtype)
        leaves = [ops.cast(t if _is_tensor(t) else tf.constant(t, "float64"), highest) for t in leaves]
        return tf.convert_to_tensor(tf.nest.pack_sequence_as(times, leaves))
    times = times if isinstance(times, keras.KerasTensor) else tf.convert_to_tensor(times)
    return ops.cast(times, _higher(dtype, times.dtype))


def _is_tensor(x: Any) -> bool:
    return tf.is_tensor(x) or isinstance(x, tf.Variable | keras.Variable | keras.KerasTensor)


def _higher(dtype: str, other: Any) -> str:
    """The higher of two precisions. Integers count as float64."""
    other = keras.backend.standardize_dtype(other)
    return keras.backend.result_type(dtype, other if keras.backend.is_float_dtype(other) else "float64")
