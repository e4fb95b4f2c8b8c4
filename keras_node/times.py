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

# Times that are this much farther from zero than from each other lose too much of their differences when they are
# rounded: half as many units of the precision.
_FAR = 16

# What an argument for times may be; a sequence may contain tensors.
Times: TypeAlias = tf.Tensor | tf.Variable | np.ndarray | Sequence


def as_numbers(times: Times) -> np.ndarray | None:
    """Returns times that are numbers, or arrays of them, as float64, and `None` for times that may need a gradient."""
    if any(is_tensor(t) for t in tf.nest.flatten(times)):
        return None
    try:
        numbers = np.asarray(times)
        if numbers.dtype.kind in "MmUSc":
            raise TypeError
        numbers = numbers.astype("float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Times must be numbers in an array without gaps. Turn dates into the time since the first of them, such as "
            f'`(dates - dates[0]) / np.timedelta64(1, "h")`. Received: {times!r}'
        ) from error
    return numbers


def prepare_times(times: Times, dtype: tf.DType | str, axis: int = -1) -> tf.Tensor:
    """Returns times as a tensor of `dtype`, or of a higher precision that tells them apart.

    Args:
        times: numbers, an array, a tensor, a variable, or a list of these.
        dtype: the precision of the state.
        axis: the axis of time.

    Returns:
        A tensor of `dtype`. Its precision is that of the times if this is higher, and float64 for integers, and for
        numbers that `dtype` does not tell apart, or that are much farther from zero than from each other.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    known = as_numbers(times)
    if known is not None:
        return tf.constant(known.astype(dtype) if _tells_apart(known, dtype, axis) else known)
    if not is_tensor(times):
        leaves = tf.nest.flatten(times)
        highest = functools.reduce(_higher, [t.dtype for t in leaves if is_tensor(t)], dtype)
        leaves = [ops.cast(t if is_tensor(t) else tf.constant(t, "float64"), highest) for t in leaves]
        return tf.convert_to_tensor(tf.nest.pack_sequence_as(times, leaves))
    times = times if isinstance(times, keras.KerasTensor) else tf.convert_to_tensor(times)
    return ops.cast(times, _higher(dtype, times.dtype))


def refuse_rounded_arrays(times: Any) -> None:
    """Raises for an array of times that Keras would round: `fit` hands arrays over in `keras.config.floatx()`."""
    times = np.asarray(times)
    if times.dtype.kind != "f":
        as_numbers(times)
        return
    with np.errstate(invalid="ignore"):  # the times of padding may be anything
        steps, rounded = np.diff(times), np.diff(times.astype(keras.config.floatx()))
        moves = np.isfinite(steps) & (steps != 0)
        is_wrong = moves & (np.abs(rounded - steps) > 0.01 * np.abs(steps))
    # Some observations may be so close to each other that rounding does no harm.
    if 2 * np.sum(is_wrong) > np.sum(moves):
        raise ValueError(
            f"Keras hands arrays to a model in {keras.config.floatx()}, which would change most differences of these "
            "times by more than 1 %. Count times from an origin close to them, or pass a `tf.data.Dataset`. "
            f"Received: steps of {steps[is_wrong][0]:.6g} at times near {times.flat[0]:.10g}"
        )


def _tells_apart(numbers: np.ndarray, dtype: str, axis: int) -> bool:
    """Whether numbers stay different in `dtype`, and its rounding is small beside the time from first to last."""
    if not numbers.size or not numbers.ndim:
        return True
    with np.errstate(invalid="ignore", over="ignore"):  # times that are not finite are for the solve to report
        steps, rounded = np.diff(numbers, axis=axis), np.diff(numbers.astype(dtype), axis=axis)
        span = np.ptp(numbers, axis=axis)
        far = (span > 0) & (np.max(np.abs(numbers), axis=axis) > _FAR * span)
    return np.array_equal(steps == 0, rounded == 0) and not np.any(far)


def is_tensor(x: Any) -> bool:
    """Whether `x` is a tensor, a variable or a symbolic tensor of Keras."""
    return tf.is_tensor(x) or isinstance(x, tf.Variable | keras.Variable | keras.KerasTensor)


def _higher(dtype: str, other: Any) -> str:
    """The higher of two precisions. Integers count as float64."""
    other = keras.backend.standardize_dtype(other)
    return keras.backend.result_type(dtype, other if keras.backend.is_float_dtype(other) else "float64")
