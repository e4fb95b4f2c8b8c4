"""Times as they come in: numbers, arrays, tensors and variables, in a precision that tells them apart.

Seconds since 1970 have no fractions in float32. So times keep the precision in which they arrive; what a solve works
with are their differences, which are formed first and then rounded to the precision of its state.
"""

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops


def as_numbers(times: Any) -> np.ndarray | None:
    """Times that are numbers, or arrays of them, as float64; `None` for what a gradient may be asked for."""
    if any(_is_tensor(t) for t in tf.nest.flatten(times)):
        return None
    return np.asarray(times, dtype="float64")


def prepare_times(times: Any, dtype: Any) -> Any:
    """Times as a tensor, of `dtype` or of a higher precision that tells them apart.

    Args:
        times: numbers, an array, a tensor, a variable, or a list in which there are some of these.
        dtype: the precision of what changes in time.

    Returns:
        A tensor of `dtype`; of the precision of the times where that is higher, as it is for integers; and of float64
        for numbers of which `dtype` would make equal ones.
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


def _is_tensor(x):
    return tf.is_tensor(x) or isinstance(x, tf.Variable | keras.Variable | keras.KerasTensor)


def _higher(dtype, other):
    """The higher of two precisions; integers have that of float64."""
    other = keras.backend.standardize_dtype(other)
    return keras.backend.result_type(dtype, other if keras.backend.is_float_dtype(other) else "float64")
