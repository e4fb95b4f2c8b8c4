"""Vector fields that change with time and with a condition: the networks of FFJORD."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_node")
class ConcatSquash(keras.layers.Layer):
    """A dense layer whose output is gated and shifted by the time.

    `y = activation((x W + b) * sigmoid(c W_g + b_g) + c W_s)`, where `c` is the time, and behind it the condition.

    Args:
        units: size of the last axis of the output.
        activation: activation, or its name. Defaults to `None`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, a scalar tensor, or `(batch, 1)` where samples have times of their own.
        inputs: the state `x`. A mask has no effect on it.
        condition: what else gates and shifts, `(batch, features)`. Defaults to `None`.

    Input shape:
        `(batch, features)`.

    Output shape:
        `(batch, units)`.

    Example:
    >>> layer = keras_node.ConcatSquash(3, activation="tanh")
    >>> layer(tf.constant(0.5), tf.ones((4, 2))).shape
    TensorShape([4, 3])

    Reference:

    - Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models", and
      its code, where the layer has its name.
    """

    def __init__(self, units: int, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.dense = keras.layers.Dense(units, dtype=self.dtype_policy)
        self.gate = keras.layers.Dense(units, activation="sigmoid", dtype=self.dtype_policy)
        self.shift = keras.layers.Dense(units, use_bias=False, dtype=self.dtype_policy)

    def build(self, t_shape, inputs_shape, condition_shape=None):
        context_shape = (None, 1 if condition_shape is None else 1 + condition_shape[-1])
        self.dense.build(inputs_shape)
        self.gate.build(context_shape)
        self.shift.build(context_shape)

    def call(self, t, inputs, condition=None):
        context = ops.reshape(t, (-1, 1))
        if condition is not None:
            context = ops.concatenate([context + ops.zeros_like(condition[:, :1]), condition], axis=-1)
        return self.activation(self.dense(inputs) * self.gate(context) + self.shift(context))

    def compute_output_shape(self, t_shape, inputs_shape, condition_shape=None):
        return (*inputs_shape[:-1], self.units)

    def get_config(self):
        config = super().get_config()
        config.update(units=self.units, activation=keras.activations.serialize(self.activation))
        return config


@keras.saving.register_keras_serializable(package="keras_node")
class ConcatSquashField(keras.layers.Layer):
    """A vector field `f(t, x, condition)`: `ConcatSquash` layers, the last as wide as the state and linear.

    Args:
        hidden_units: the widths of the hidden layers. Defaults to `(64, 64)`.
        activation: of the hidden layers; a smooth one, since a flow differentiates it twice. Defaults to `"tanh"`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, a scalar tensor, or `(batch, 1)` where samples have times of their own.
        inputs: the state. A mask has no effect on it.
        condition: `(batch, features)`, or `None`.

    Input shape:
        `(batch, features)`.

    Output shape:
        The input's.

    Example:
    >>> flow = keras_node.ContinuousFlow(2, keras_node.ConcatSquashField((32, 32)))
    >>> flow.log_prob(tf.zeros((4, 2))).shape
    TensorShape([4])

    Reference:

    - Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models".
    """

    def __init__(self, hidden_units=(64, 64), activation="tanh", **kwargs):
        super().__init__(**kwargs)
        self.hidden_units = tuple(hidden_units)
        self.activation = keras.activations.get(activation)

    def build(self, t_shape, inputs_shape, condition_shape=None):
        widths = (*self.hidden_units, inputs_shape[-1])
        activations = (*[self.activation] * len(self.hidden_units), None)
        self.layers = [
            ConcatSquash(units, activation, dtype=self.dtype_policy)
            for units, activation in zip(widths, activations, strict=True)
        ]
        for layer, features in zip(self.layers, (inputs_shape[-1], *self.hidden_units), strict=True):
            layer.build(t_shape, (None, features), condition_shape)

    def call(self, t, inputs, condition):
        for layer in self.layers:
            inputs = layer(t, inputs, condition)
        return inputs

    def compute_output_shape(self, t_shape, inputs_shape, condition_shape=None):
        return inputs_shape

    def get_config(self):
        config = super().get_config()
        config.update(hidden_units=list(self.hidden_units), activation=keras.activations.serialize(self.activation))
        return config
