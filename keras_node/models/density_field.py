"""The vector field of a flow, together with the rates that a flow integrates along its paths."""

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node.signatures import FieldCall, like_state

# How many rows of the Jacobian are computed from one copy of the batch. The field is evaluated once on all copies, and
# each row takes one vector-Jacobian product.
# A training step in 6 dimensions (XLA, batch 256, a busy machine) took 46 ms with one row in a copy, 29 ms with four
# and 22 ms with all six. Compiling took 57, 51 and 91 s, and the program grows further with the number of rows.
# `vectorized_map` and `batch_jacobian` need no copies. But under XLA they call a function whose gradient is a second
# function, which reshapes to the shape of the first one's result. A shape must be a constant, so XLA treats all inputs
# of the first function as constants, and compiles again whenever a weight changes.
_ROWS_PER_COPY = 4


class DensityField:
    """A field for the state `(x, integrals)`, which takes `args = (condition, noise)`.

    The columns of `integrals` have the rates `tr(df/dx)` and, with `energies`, `||f||^2` and `||df/dx||_F^2`. Without
    noise, the whole Jacobian is computed. With noise `e` of covariance one, only the product `e^T df/dx` is computed:
    the means of `e^T (df/dx) e` and `||e^T df/dx||^2` are the exact values.

    Args:
        function: the field of `x`, `f(x)`, `f(t, x)` or `f(t, x, condition)`.
        energies: whether to return the rates of the two energies as well.
    """

    def __init__(self, function: keras.Layer | Callable, energies: bool) -> None:
        self.function = function
        self.energies = energies
        self._call = FieldCall(function)

    def __call__(self, t: tf.Tensor, state: tuple, args: tuple, training: bool | None = None) -> tuple:
        (x, _), (condition, noise) = state, args
        dim: int = x.shape[1]
        rows = dim if noise is None else 1
        copies = math.ceil(rows / _ROWS_PER_COPY)
        per_copy = math.ceil(rows / copies)

        def copied(a: Any) -> Any:
            unchanged = a is None or a.shape.rank == 0 or copies == 1
            return a if unchanged else tf.tile(a, [copies] + [1] * (a.shape.rank - 1))

        if noise is None:
            # If the copies have more rows than the Jacobian, the cotangents of the surplus rows are zero.
            basis = tf.reshape(tf.eye(copies * per_copy, dim, dtype=x.dtype), (copies, per_copy, 1, dim))
            cotangents = [tf.reshape(e + tf.zeros_like(x), (-1, dim)) for e in tf.unstack(basis, axis=1)]
        else:
            cotangents = [tf.stop_gradient(noise)]
        inputs = copied(x)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            dx = self._evaluate(copied(t), inputs, copied(condition), training)
        products = [tape.gradient(dx, inputs, e, tf.UnconnectedGradients.ZERO) for e in cotangents]

        def summed(terms: list[tf.Tensor]) -> tf.Tensor:
            return tf.reduce_sum(tf.reshape(tf.add_n(terms), (copies, -1, dim)), axis=(0, 2))

        dx = tf.reshape(dx, (copies, -1, dim))[0]
        rates = [summed([p * e for p, e in zip(products, cotangents, strict=True)])]
        if self.energies:
            rates += [tf.reduce_sum(dx**2, axis=1), summed([p**2 for p in products])]
        return dx, tf.stack(rates, axis=1)

    def _evaluate(self, t: tf.Tensor, x: tf.Tensor, condition: Any, training: bool | None) -> tf.Tensor:
        return like_state(self._call(t, x, condition, training), x, self.function)

    def __repr__(self) -> str:
        return repr(self.function)


def draw_noise(kind: str, like: tf.Tensor, seed: keras.random.SeedGenerator) -> tf.Tensor:
    """Returns noise of covariance one in the shape of `like`: of kind `"gaussian"`, or of 1 and -1 (`"rademacher"`)."""
    if kind == "gaussian":
        return keras.random.normal(keras.ops.shape(like), dtype=like.dtype, seed=seed)
    uniform = keras.random.uniform(keras.ops.shape(like), -1, 1, like.dtype, seed)
    return tf.where(uniform < 0, -tf.ones_like(like), tf.ones_like(like))
