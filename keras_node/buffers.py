"""A buffer for tensors of one shape, which a loop writes one by one."""

import math
from typing import TypeAlias

import tensorflow as tf

# Outside XLA, every write copies the whole buffer. Up to this many entries, that is cheaper than blocks.
_FEW = 64
# A copy of so many scalars is cheap, and ONNX has no arrays of scalars.
_FEW_SCALARS = 8192


class _Blocks(tf.experimental.ExtensionType):
    """Tensors in blocks. One block is open.

    A write copies the open block only. A block holds about the square root of the number of all tensors.
    """

    whole: tf.Tensor  # (blocks, rows, ...)
    block: tf.Tensor  # (rows, ...), the open block; its copy in `whole` may be out of date
    number: tf.Tensor  # the index of the open block

    def write(self, index: tf.Tensor, value: tf.Tensor) -> "_Blocks":
        rows = tf.shape(self.block)[0]
        opened = self._with_block(index // rows)
        return _Blocks(opened.whole, _with_row(opened.block, index % rows, value), opened.number)

    def read(self, index: tf.Tensor) -> tf.Tensor:
        rows = tf.shape(self.block)[0]
        return tf.where(
            index // rows == self.number,
            tf.gather(self.block, index % rows),
            tf.gather_nd(self.whole, [index // rows, index % rows]),
        )

    def stack(self) -> tf.Tensor:
        whole = _with_row(self.whole, self.number, self.block)
        sizes = [size or tf.shape(whole)[axis] for axis, size in enumerate(whole.shape)]
        return tf.reshape(whole, [-1, *sizes[2:]])

    def _with_block(self, number: tf.Tensor) -> "_Blocks":
        """The same tensors with the block `number` open."""

        def change(blocks: _Blocks) -> tuple[_Blocks]:
            whole = _with_row(blocks.whole, blocks.number, blocks.block)
            return (_Blocks(whole, tf.ensure_shape(tf.gather(whole, number), self.block.shape), number),)

        # A loop of at most one round replaces a `tf.cond`: XLA copies the operands of a `tf.cond`, but updates loop
        # variables in place.
        return tf.while_loop(lambda blocks: blocks.number != number, change, (self,), maximum_iterations=1)[0]


Buffer: TypeAlias = tf.TensorArray | tf.Tensor | _Blocks


def new_buffer(size: int | tf.Tensor, like: tf.Tensor, exported: bool = True) -> Buffer:
    """Returns a buffer for `size` tensors with the shape and dtype of `like`, which need not all be written.

    The buffer may hold some more entries after these. In eager mode it ends at the last tensor that was written. In a
    loop that no exported model contains, such as that of a gradient, `exported=False` makes it faster.
    """
    if tf.executing_eagerly():
        array = tf.TensorArray(like.dtype, 0, dynamic_size=True, element_shape=like.shape, clear_after_read=False)
        return array.write(0, like)
    few = isinstance(size, int) and size <= (_FEW if like.shape.rank else _FEW_SCALARS)
    # LiteRT has no lists of tensors whose size is unknown, for example that of the batch.
    if (like.shape.is_fully_defined() or not exported) and not (few and like.shape.rank == 0):
        # A stack is only defined if at least one entry was written.
        array = tf.TensorArray(like.dtype, size, element_shape=like.shape, clear_after_read=False)
        return array.write(0, like)

    def nothing(*sizes: int | tf.Tensor) -> tf.Tensor:
        zeros = tf.zeros(tf.concat([sizes, tf.shape(like)], axis=0), like.dtype)
        return tf.ensure_shape(zeros, [None for _ in sizes] + like.shape)

    if few:
        return write(nothing(size), 0, like)
    rows = math.isqrt(size) + 1 if isinstance(size, int) else tf.cast(tf.sqrt(tf.cast(size, tf.float32)), tf.int32) + 1
    return write(_Blocks(nothing(size // rows + 1, rows), nothing(rows), tf.constant(0)), 0, like)


def write(buffer: Buffer, index: int | tf.Tensor, value: tf.Tensor) -> Buffer:
    """Returns the buffer with `value` at `index`."""
    return _with_row(buffer, index, value) if isinstance(buffer, tf.Tensor) else buffer.write(index, value)


def read(buffer: Buffer, index: int | tf.Tensor) -> tf.Tensor:
    """Returns the tensor at `index`."""
    return tf.gather(buffer, index) if isinstance(buffer, tf.Tensor) else buffer.read(index)


def stack(buffer: Buffer) -> tf.Tensor:
    """Returns all tensors along a new first axis."""
    return buffer if isinstance(buffer, tf.Tensor) else buffer.stack()


def _with_row(x: tf.Tensor, index: int | tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """The tensor `x` with `x[index]` replaced by `row`."""
    indices, rows = tf.reshape(index, [1, 1]), row[None]
    if not row.shape.is_fully_defined():
        # TensorFlow refuses an index at which there is nothing to write, as in a batch of no samples.
        number = tf.minimum(tf.reduce_prod(tf.shape(row)), 1)
        indices, rows = indices[:number], rows[:number]
    return tf.ensure_shape(tf.tensor_scatter_nd_update(x, indices, rows), x.shape)
