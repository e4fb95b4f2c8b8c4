"""The inverses of a batch of small matrices, in operations that every compiler and converter knows."""

import tensorflow as tf


def inverse(matrices: tf.Tensor) -> tf.Tensor:
    """Returns the inverses of matrices, `(batch, n, n)`, by Gauss-Jordan elimination with row pivoting.

    If a matrix is singular or not finite, its inverse is not finite, and the others are right. `tf.linalg.inv` raises
    an error instead, XLA computes it by a slower QR decomposition, and neither ONNX nor LiteRT has it.
    """
    n = matrices.shape[-1]
    unit = tf.eye(n, dtype=matrices.dtype)
    # The batch is the last axis, so that each operation works on contiguous numbers of all samples.
    work = tf.transpose(matrices, [1, 2, 0])

    def eliminate(k: tf.Tensor, work: tf.Tensor, free: tf.Tensor, pivots: tf.Tensor) -> tuple:
        column = tf.gather(work, k, axis=1)
        # NaN is never the largest, so a matrix with NaN takes any free row.
        magnitude = tf.where(tf.math.is_finite(column), tf.abs(column), tf.zeros_like(column))
        pivot = tf.one_hot(tf.argmax(tf.where(free, magnitude, -tf.ones_like(column)), axis=0), n, axis=0)
        is_pivot = pivot > 0
        pivot = tf.cast(pivot, work.dtype)
        # Column k is now known: it is that of the identity. The column of the inverse takes its place.
        here = tf.gather(unit, k)[None, :, None]
        work = tf.where(here > 0, pivot[:, None, :], work)
        row = tf.reduce_sum(tf.where(is_pivot[:, None, :], work, 0), 0) / tf.reduce_sum(
            tf.where(is_pivot, column, 0), 0
        )
        work = tf.where(is_pivot[:, None, :], row[None], work - column[:, None, :] * row[None])
        return k + 1, work, free & ~is_pivot, tf.where(tf.gather(unit, k)[:, None, None] > 0, pivot[None], pivots)

    free = tf.ones_like(work[:, 0, :], dtype=tf.bool)
    _, work, _, pivots = tf.while_loop(
        lambda k, *_: k < n, eliminate, (0, work, free, tf.zeros_like(work)), maximum_iterations=n
    )
    # Row k of `pivots` tells which row of the matrix was the pivot of column k.
    work, pivots = (tf.transpose(x, [2, 0, 1]) for x in (work, pivots))
    return tf.matmul(pivots, tf.matmul(work, pivots))
