"""Room for a number of equal tensors, written one by one while a loop goes by."""

import math

import tensorflow as tf

# Outside XLA every write copies the whole buffer. Up to this many entries that is cheaper than having blocks.
_FEW = 64


class _Blocks(tf.experimental.ExtensionType):
    """Tensors in blocks, one of which is at hand: a write copies that one alone, of about the root of their number."""

    whole: tf.Tensor  # (blocks, rows, ...)
    block: tf.Tensor  # (rows, ...), newer than in the whole
    number: tf.Tensor  # which block that is

    def write(self, index: tf.Tensor, value: tf.Tensor) -> "_Blocks":
        rows = tf.shape(self.block)[0]
        at_hand = self._with_block(index // rows)
        return _Blocks(at_hand.whole, _with_row(at_hand.block, index % rows, value), at_hand.number)

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

    def _with_block(self, number):
        """The same tensors with another block at hand, if it is another."""

        def change(blocks):
            whole = _with_row(blocks.whole, blocks.number, blocks.block)
            return (_Blocks(whole, tf.ensure_shape(tf.gather(whole, number), self.block.shape), number),)

        # XLA copies the operands of a `tf.cond`, but updates loop variables in place: hence a loop of one round.
        return tf.while_loop(lambda blocks: blocks.number != number, change, (self,), maximum_iterations=1)[0]


Buffer = tf.TensorArray | tf.Tensor | _Blocks


def new_buffer(size: int | tf.Tensor, like: tf.Tensor) -> Buffer:
    """Room for `size` tensors, which need not all be written.

    It may have some more in the end. Eagerly it has those up to the last one written.
    """
    if tf.executing_eagerly():
        array = tf.TensorArray(like.dtype, 0, dynamic_size=True, element_shape=like.shape, clear_after_read=False)
        return array.write(0, like)
    if like.shape.is_fully_defined():
        # With one of them written, stacking it is defined.
        array = tf.TensorArray(like.dtype, size, element_shape=like.shape, clear_after_read=False)
        return array.write(0, like)

    def nothing(*sizes):
        zeros = tf.zeros(tf.concat([sizes, tf.shape(like)], axis=0), like.dtype)
        return tf.ensure_shape(zeros, [None for _ in sizes] + like.shape)

    # LiteRT has no list of tensors of an unknown size, such as that of a batch.
    if isinstance(size, int) and size <= _FEW:
        return write(nothing(size), 0, like)
    rows = math.isqrt(size) + 1 if isinstance(size, int) else tf.cast(tf.sqrt(tf.cast(size, tf.float32)), tf.int32) + 1
    return write(_Blocks(nothing(size // rows + 1, rows), nothing(rows), tf.constant(0)), 0, like)


def write(buffer: Buffer, index: tf.Tensor, value: tf.Tensor) -> Buffer:
    """The buffer with `value` at `index`."""
    return _with_row(buffer, index, value) if isinstance(buffer, tf.Tensor) else buffer.write(index, value)


def read(buffer: Buffer, index: tf.Tensor) -> tf.Tensor:
    """The tensor at `index`."""
    return tf.gather(buffer, index) if isinstance(buffer, tf.Tensor) else buffer.read(index)


def stack(buffer: Buffer) -> tf.Tensor:
    """All tensors along a new first axis."""
    return buffer if isinstance(buffer, tf.Tensor) else buffer.stack()


def _with_row(x, index, row):
    return tf.ensure_shape(tf.tensor_scatter_nd_update(x, [[index]], row[None]), x.shape)
