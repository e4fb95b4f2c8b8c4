"""Dynamics that conserve an energy, as a vector field."""

from typing import ClassVar

import keras
import tensorflow as tf

from keras_node.layers.second_order_field import halves, joined
from keras_node.nested_layers import NestedLayers
from keras_node.signatures import FieldCall


@keras.saving.register_keras_serializable(package="keras_node")
class HamiltonianField(NestedLayers, keras.layers.Layer):
    """The vector field of Hamilton's equations: a scalar energy `H(q, p)` gives all rates of change.

    `dq/dt = dH/dp`

    `dp/dt = -dH/dq`

    The exact solution conserves an energy that does not depend on time; a solver's drifts away from it as slowly as its
    tolerances say. The state holds positions and momenta, in the halves of its last axis or as a tuple `(q, p)`.

    Args:
        energy: a Keras layer or model, or a registered callable, `(y)` or `(t, y)`, from the state to one number for
            each sample, `(batch,)` or `(batch, ..., 1)`, which are summed up. It is differentiated: activations should
            be smooth, such as `"tanh"` or `"softplus"`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, which an energy `(y)` does not see.
        y: the state, `(batch, ..., 2 * n)`, or a tuple of two tensors of the same shape.
        y_mask: the mask of the state, handed on to an energy that takes `mask`.

    Input shape:
        `t` a scalar or `(batch, 1, ..., 1)`, `y` as above.

    Output shape:
        That of `y`.

    Example:
    >>> energy = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(1)])
    >>> field = keras_node.HamiltonianField(energy)
    >>> layer = keras_node.ODELayer(field, solver=keras_node.RungeKutta(rtol=1e-6))
    >>> y = keras.random.normal((4, 2))
    >>> bool(keras.ops.all(keras.ops.abs(energy(layer(y)) - energy(y)) < 1e-4))
    True

    Reference:

    - Greydanus, Dzamba & Yosinski (2019), "Hamiltonian Neural Networks".
    """

    nested: ClassVar = {"energy": "energy"}

    def __init__(self, energy, **kwargs):
        super().__init__(autocast=False, **kwargs)
        if FieldCall(energy).num_arguments == 3:
            raise ValueError(f"An energy takes `(y)` or `(t, y)`. Received: energy={energy!r}")
        self.energy = energy

    def call(self, t, y, y_mask=None):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(y)
            energy = FieldCall(self.energy, y)(t, y, mask=y_mask)
        rank = len(energy.shape)
        if rank == 0 or (rank > 1 and energy.shape[-1] != 1):
            raise ValueError(
                "An energy is one number for each sample, (batch,) or (batch, ..., 1). "
                f"Received: shape={tuple(energy.shape)} from {self.energy!r}"
            )
        slopes = tape.gradient(energy, y, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        dq, dp = halves(slopes)
        return joined(dp, -dq, y)
