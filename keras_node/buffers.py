"""Room for a number of equal tensors, written one by one while a loop goes by."""

from typing import Any

import tensorflow as tf

Buffer = Any  # a `tf.TensorArray`, or a tensor with a new first axis

# Every write copies a tensor as a whole in a graph without XLA, which costs little up to this number.
_FEW = 256


def new_buffer(size: int | tf.Tensor, like: tf.Tensor) -> Buffer:
    """Room for `size` tensors; it can be stacked whether or not all of them are written."""
    few = isinstance(size, int) and size <= _FEW
    if like.shape.is_fully_defined() or not few:
        # With one of them written, stacking it is defined.
        array = tf.TensorArray(like.dtype, size, element_shape=like.shape, clear_after_read=False)
        return array.write(0, like)
    # LiteRT has no list of tensors of an unknown size, such as that of a batch.
    nothing = tf.zeros(tf.concat([[size], tf.shape(like)], axis=0), like.dtype)
    return write(tf.ensure_shape(nothing, [None, *like.shape]), 0, like)


def write(buffer: Buffer, index: tf.Tensor, value: tf.Tensor) -> Buffer:
    """The buffer with `value` at `index`."""
    if isinstance(buffer, tf.TensorArray):
        return buffer.write(index, value)
    return tf.ensure_shape(tf.tensor_scatter_nd_update(buffer, [[index]], value[None]), buffer.shape)


def read(buffer: Buffer, index: tf.Tensor) -> tf.Tensor:
    """The tensor at `index`."""
    return buffer.read(index) if isinstance(buffer, tf.TensorArray) else tf.gather(buffer, index)


def stack(buffer: Buffer) -> tf.Tensor:
    """All tensors along a new first axis."""
    return buffer.stack() if isinstance(buffer, tf.TensorArray) else buffer
