"""Times and jumps: as a layer is called with them, and as a solve takes them."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.arguments import number
from keras_node.jumps import check_jumps, map_amounts
from keras_node.times import as_numbers, is_tensor, prepare_times
from keras_node.trees import Nest


def shape_of(ts: Any) -> tuple:
    """The shape of times, which may be numbers or a spec."""
    return tuple(ts.shape) if hasattr(ts, "shape") else np.shape(ts)


def check_times(shape: tuple) -> None:
    """Checks the shape of times."""
    if len(shape) not in (1, 2) or shape[-1] == 0:
        raise ValueError(
            f"`ts` must be of shape (T,) or (batch, T), with one time or more. Received: ts.shape={tuple(shape)}"
        )


def fixed_time(name: str, time: Any) -> float:
    """Returns a time that a layer keeps, as a Python float."""
    if isinstance(time, tf.Variable | keras.Variable):
        raise ValueError(
            f"`{name}` is a constant of the layer. To train a time, pass it in `ts` when you call the layer. "
            f"Received: {name}={time!r}"
        )
    time = number(name, float(time) if tf.is_tensor(time) or isinstance(time, np.ndarray) else time)
    if not math.isfinite(time):
        raise ValueError(f"`{name}` must be a finite number. Received: {name}={time}")
    return time


def times_to_call(ts: Any, dtype: str) -> Any:
    """Returns times as Keras can pass them to `call`."""
    if ts is None:
        return None
    check_times(shape_of(ts))
    if as_numbers(ts) is None:
        return prepare_times(ts, dtype) if isinstance(ts, list | tuple) else ts
    # Keras would convert an array to a tensor, and then the solve would compute a gradient for these times.
    return ts.tolist() if isinstance(ts, np.ndarray) else ts


def args_to_call(args: Nest, dtype: str) -> Nest:
    """Returns `args` as Keras can pass them to `call`: beside tensors, it takes numbers only as tensors."""
    args = tf.nest.map_structure(lambda x: argument_to_call(x, dtype), args)
    if not any(is_tensor(x) for x in tf.nest.flatten(args)):
        return args

    def leaf(x: Any) -> Any:
        if isinstance(x, float):
            return ops.convert_to_tensor(x, dtype)
        return tf.convert_to_tensor(x) if isinstance(x, int) else x

    return tf.nest.map_structure(leaf, args)


def argument_to_call(x: Any, dtype: str) -> Any:
    """Returns an argument as Keras can pass it to `call`: it would convert a NumPy array to a float64 tensor."""
    if not isinstance(x, np.ndarray | np.generic) or not np.issubdtype(x.dtype, np.floating):
        return x
    return ops.convert_to_tensor(x, dtype)


def jumps_to_call(jumps: Any, dtype: str) -> Any:
    """Returns jumps as numbers, or as tensors if any of them is one, because Keras does not take a mixture."""
    if jumps is None:
        return None
    check_jumps(jumps)
    if any(as_numbers(x) is None for x in tf.nest.flatten(tuple(jumps))):
        amounts = tf.nest.map_structure(lambda x: argument_to_call(x, dtype), jumps[1])
        return prepare_times(jumps[0], dtype), amounts
    if np.size(jumps[0]) == 0:
        return None  # a list without numbers has lost its other axes
    return tf.nest.map_structure(lambda x: np.asarray(x).tolist(), tuple(jumps))


def check_own_times(ts: Any, y0: Nest, layer: keras.Layer) -> None:
    """Checks the first axis of times that belong to samples, which is their last axis in `odeint`."""
    shape, batch = shape_of(ts), tf.nest.flatten(y0)[0].shape[0]
    if len(shape) == 2 and None not in (shape[0], batch) and shape[0] != batch:
        raise ValueError(
            f"`ts` must be of shape (T,) or (batch, T). Received: ts.shape={tuple(shape)} for a batch of {batch}, in "
            f"layer {layer.name!r}"
        )


def times_to_solve(ts: Any, t0: float, dtype: str) -> Any:
    """Returns the times of a solve, with `t0` first: `(T + 1,)` or `(T + 1, batch)`."""
    known = as_numbers(ts)
    if known is not None and known.ndim in (1, 2):
        return np.concatenate([np.full_like(known.T[:1], t0), known.T], axis=0)
    ts = prepare_times(ts, dtype)
    if len(ts.shape) not in (1, 2):
        raise ValueError(f"`ts` must be of shape (T,) or (batch, T). Received: ts.shape={tuple(ts.shape)}")
    ts = ops.transpose(ts)
    return ops.concatenate([ops.full_like(ts[:1], t0), ts], axis=0)


def jumps_to_solve(jumps: Any, y0: Nest, augment_dims: int, dtype: str) -> tuple[Any, Nest] | None:
    """Returns times and amounts of jumps with the axis of jumps first. Extra dimensions do not jump."""
    if jumps is None:
        return None

    def amount(a: Any, y: tf.Tensor) -> tf.Tensor:
        a = ops.cast(ops.convert_to_tensor(a), dtype)
        if augment_dims:
            a = ops.pad(a, [(0, 0)] * (len(a.shape) - 1) + [(0, augment_dims)])
        return ops.moveaxis(a, 1, 0) if len(a.shape) == len(y.shape) + 1 else a

    return times_first(jumps[0], dtype), map_amounts(amount, jumps[1], y0)


def times_first(times: Any, dtype: str) -> Any:
    """Returns times, `(T,)` or `(batch, T)`, with their axis first. Numbers keep their digits."""
    known = as_numbers(times)
    return ops.transpose(prepare_times(times, dtype)) if known is None else known.T
