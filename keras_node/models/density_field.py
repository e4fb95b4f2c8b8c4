"""The vector field of a flow together with what a flow integrates along its paths."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node.vector_field import call_arguments, field_inputs, like_state


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
        self.num_arguments, self.takes_training = call_arguments(function)

    def __call__(self, t: tf.Tensor, state: tuple, args: tuple, training: bool | None = None) -> tuple:
        (x, _), (condition, noise) = state, args
        # A copy of the batch for every row of the Jacobian, or one for the noise. `batch_jacobian` would save copies,
        # but makes XLA compile a training step anew whenever the weights change.
        copies = x.shape[1] if noise is None else 1
        shape = (copies, -1, x.shape[1])

        def copied(a):
            return a if a is None or a.shape.rank == 0 else tf.tile(a, [copies] + [1] * (a.shape.rank - 1))

        rows = copied(x)
        if noise is None:
            cotangent = tf.reshape(tf.eye(copies, dtype=x.dtype)[:, None] + tf.zeros_like(x)[None], tf.shape(rows))
        else:
            cotangent = tf.stop_gradient(noise)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(rows)
            dx = self._evaluate(copied(t), rows, copied(condition), training)
        product = tape.gradient(dx, rows, cotangent, tf.UnconnectedGradients.ZERO)
        dx = tf.reshape(dx, shape)[0]
        rates = [tf.reduce_sum(tf.reshape(product * cotangent, shape), axis=(0, 2))]
        if self.energies:
            rates += [tf.reduce_sum(dx**2, axis=1), tf.reduce_sum(tf.reshape(product**2, shape), axis=(0, 2))]
        return dx, tf.stack(rates, axis=1)

    def _evaluate(self, t: tf.Tensor, x: tf.Tensor, condition: Any, training: bool | None) -> tf.Tensor:
        keywords = {"training": training} if self.takes_training and training is not None else {}
        return like_state(
            self.function(*field_inputs(self.num_arguments, t, x, condition), **keywords), x, self.function
        )

    def __repr__(self) -> str:
        return repr(self.function)
