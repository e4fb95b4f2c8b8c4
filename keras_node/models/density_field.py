"""The vector field of a flow together with what a flow integrates along its paths."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node.vector_field import call_arguments, field_inputs, like_state


class DensityField:
    """A field for the state `(x, integrals)`, the columns of `integrals` having the rates

    `tr(df/dx)`, and with `energies` also `||f||^2` and `||df/dx||_F^2`.

    Called with `args = (condition, noise)`. Without noise the Jacobian is formed; with noise `e`, of covariance one, it
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
        # In a graph all rows of a Jacobian are one vectorised product; eagerly, tracing that would take longer.
        eager = tf.executing_eagerly()
        with tf.GradientTape(persistent=eager, watch_accessed_variables=False) as tape:
            tape.watch(x)
            dx = self._evaluate(t, x, condition, training)
        zero = tf.UnconnectedGradients.ZERO
        if noise is None:
            jacobian = tape.batch_jacobian(dx, x, zero, experimental_use_pfor=not eager)
            trace = tf.linalg.trace(jacobian)
        else:
            noise = tf.stop_gradient(noise)
            product = tape.gradient(dx, x, noise, zero)
            jacobian = product[:, None]
            trace = tf.reduce_sum(product * noise, axis=1)
        rates = [trace]
        if self.energies:
            rates += [tf.reduce_sum(dx**2, axis=1), tf.reduce_sum(jacobian**2, axis=(1, 2))]
        return dx, tf.stack(rates, axis=1)

    def _evaluate(self, t: tf.Tensor, x: tf.Tensor, condition: Any, training: bool | None) -> tf.Tensor:
        keywords = {"training": training} if self.takes_training and training is not None else {}
        return like_state(
            self.function(*field_inputs(self.num_arguments, t, x, condition), **keywords), x, self.function
        )

    def __repr__(self) -> str:
        return repr(self.function)
