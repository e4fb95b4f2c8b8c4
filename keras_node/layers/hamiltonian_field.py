"""Dynamics that conserve an energy, as a vector field."""

import keras
import tensorflow as tf

from keras_node.layers.second_order import halves, joined
from keras_node.vector_field import call_arguments, field_inputs


@keras.saving.register_keras_serializable(package="keras_node")
class HamiltonianField(keras.layers.Layer):
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

    def __init__(self, energy, **kwargs):
        super().__init__(autocast=False, **kwargs)
        if call_arguments(energy)[0] == 3:
            raise ValueError(f"An energy takes `(y)` or `(t, y)`. Received: energy={energy!r}")
        self.energy = energy

    def call(self, t, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(y)
            energy = self.energy(*field_inputs(call_arguments(self.energy)[0], t, y, None))
        if len(energy.shape) != 1 and energy.shape[-1] != 1:
            raise ValueError(
                "An energy is one number for each sample, (batch,) or (batch, ..., 1). "
                f"Received: shape={tuple(energy.shape)} from {self.energy!r}"
            )
        slopes = tape.gradient(energy, y, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        dq, dp = halves(slopes)
        return joined(dp, -dq, y)

    def get_config(self):
        config = super().get_config()
        config["energy"] = keras.saving.serialize_keras_object(self.energy)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["energy"] = keras.saving.deserialize_keras_object(config["energy"])
        return cls(**config)
