"""The vector field of a flow together with what a flow integrates along its paths."""

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node.signatures import FieldCall, like_state

# How many rows of the Jacobian come from one copy of the batch, by a vector-Jacobian product each on one evaluation.
# A training step in 6 dimensions (XLA, batch 256, a busy machine) took 46 ms with one row on a copy, 29 ms with four
# and 22 ms with all six; compiling these took 57, 51 and 91 s, and the program goes on to grow with the rows.
# `vectorized_map` and `batch_jacobian` need no copies, but under XLA they call a function, and its gradient is a second
# one that reshapes to what the first returns. A shape must be a constant, so XLA takes all that enters the first for
# constants, and compiles anew whenever a weight changes.
_ROWS_PER_COPY = 4


class DensityField:
    """A field for the state `(x, integrals)`.

    The columns of `integrals` have the rates `tr(df/dx)` and, with `energies`, `||f||^2` and `||df/dx||_F^2`. Called
    with `args = (condition, noise)`. Without noise the Jacobian is formed; with noise `e`, of covariance one, it
    is only multiplied from the left: `e^T (df/dx) e` and `||e^T df/dx||^2` have the exact values as their means.

    Args:
        function: the field of `x`, `f(x)`, `f(t, x)` or `f(t, x, condition)`.
        energies: whether to give the rates of the two energies.
    """

    def __init__(self, function: keras.Layer | Callable, energies: bool):
        self.function = function
        self.energies = energies
        self._call = FieldCall(function)

    def __call__(self, t: tf.Tensor, state: tuple, args: tuple, training: bool | None = None) -> tuple:
        (x, _), (condition, noise) = state, args
        dim = x.shape[1]
        rows = dim if noise is None else 1
        copies = math.ceil(rows / _ROWS_PER_COPY)
        per_copy = math.ceil(rows / copies)

        def copied(a):
            unchanged = a is None or a.shape.rank == 0 or copies == 1
            return a if unchanged else tf.tile(a, [copies] + [1] * (a.shape.rank - 1))

        if noise is None:
            # A row that is not there has the cotangent zero.
            basis = tf.reshape(tf.eye(copies * per_copy, dim, dtype=x.dtype), (copies, per_copy, 1, dim))
            cotangents = [tf.reshape(e + tf.zeros_like(x), (-1, dim)) for e in tf.unstack(basis, axis=1)]
        else:
            cotangents = [tf.stop_gradient(noise)]
        inputs = copied(x)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            dx = self._evaluate(copied(t), inputs, copied(condition), training)
        products = [tape.gradient(dx, inputs, e, tf.UnconnectedGradients.ZERO) for e in cotangents]

        def summed(terms):
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
