"""A state, or a nest of them, as a matrix with one row per sample."""

import tensorflow as tf

from keras_node.trees import Nest


class Rows:
    """Writes a state as a matrix with one row per sample, and a matrix as a state.

    Args:
        like: a state. The first axis of each of its tensors is the batch, if all have two axes or more. Otherwise the
            whole state is one sample.
        has_batch: whether the first axis is the batch in any case.
    """

    def __init__(self, like: Nest, has_batch: bool) -> None:
        leaves = tf.nest.flatten(like)
        self.like = like
        self.first = int(has_batch or all(leaf.shape.rank >= 2 for leaf in leaves))
        self.sizes = [leaf.shape[self.first :].num_elements() for leaf in leaves]
        if None in self.sizes:
            raise ValueError(
                "An implicit method needs the sizes of the state, all but that of the batch: set them by "
                f"`tf.ensure_shape`. Received: a state of shape {[tuple(leaf.shape) for leaf in leaves]}"
            )

    def join(self, state: Nest) -> tf.Tensor:
        """The state as a matrix, `(batch, n)`."""
        leaves = tf.nest.flatten(state)
        rows = [tf.reshape(x, [-1 if self.first else 1, size]) for x, size in zip(leaves, self.sizes, strict=True)]
        return rows[0] if len(rows) == 1 else tf.concat(rows, axis=1)

    def split(self, rows: tf.Tensor) -> Nest:
        """The matrix as a state."""
        leaves = tf.nest.flatten(self.like)
        parts = [rows] if len(leaves) == 1 else tf.split(rows, self.sizes, axis=1)
        shaped = [
            tf.ensure_shape(tf.reshape(part, [-1, *leaf.shape[1:]] if self.first else leaf.shape), leaf.shape)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return tf.nest.pack_sequence_as(self.like, shaped)
