"""Vector fields that depend on time and on a condition: the networks of FFJORD."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node.nested_layers import keep_frozen


@keras.saving.register_keras_serializable(package="keras_node")
class ConcatSquash(keras.layers.Layer):
    """A dense layer whose output the time scales and shifts.

    `y = activation((x W + b) * sigmoid(c W_g + b_g) + c W_s)`

    Here `c` is the time `t`, followed by the condition if there is one.

    Args:
        units: size of the last axis of the output, a positive integer.
        activation: the activation, or its name. Defaults to `None`, which makes the layer linear in `x`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, a scalar tensor, or `(batch, 1)` if each sample has its own time. The layer uses its value, so the
            unit and the origin of time matter.
        inputs: the state `x`.
        condition: further numbers that scale and shift the output, `(batch, features)`. Defaults to `None`.

    Input shape:
        `(batch, features)`.

    Output shape:
        `(batch, units)`.

    Masking:
        A mask has no effect, and the layer does not pass it on.

    Example:
        >>> layer = keras_node.ConcatSquash(3, activation="tanh")
        >>> layer(tf.constant(0.5), tf.ones((4, 2))).shape
        TensorShape([4, 3])

    Reference:

        - Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models",
          arXiv:1810.01367. The code of the paper gives the layer this name.
    """

    def __init__(self, units: int, activation: str | Callable | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.dense = keras.layers.Dense(units, dtype=self.dtype_policy)
        self.gate = keras.layers.Dense(units, activation="sigmoid", dtype=self.dtype_policy)
        self.shift = keras.layers.Dense(units, use_bias=False, dtype=self.dtype_policy)
        keep_frozen(self)

    def build(self, t_shape: tuple, inputs_shape: tuple, condition_shape: tuple | None = None) -> None:
        context_shape = (None, 1 if condition_shape is None else 1 + condition_shape[-1])
        self.dense.build(inputs_shape)
        self.gate.build(context_shape)
        self.shift.build(context_shape)

    def call(self, t: tf.Tensor, inputs: tf.Tensor, condition: tf.Tensor | None = None) -> tf.Tensor:
        context = ops.reshape(t, (-1, 1))
        if condition is not None:
            context = ops.concatenate([context + ops.zeros_like(condition[:, :1]), condition], axis=-1)
        return self.activation(self.dense(inputs) * self.gate(context) + self.shift(context))

    def compute_output_shape(self, t_shape: tuple, inputs_shape: tuple, condition_shape: tuple | None = None) -> tuple:
        return (*inputs_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(units=self.units, activation=keras.activations.serialize(self.activation))
        return config


@keras.saving.register_keras_serializable(package="keras_node")
class ConcatSquashField(keras.layers.Layer):
    """A vector field `f(t, x, condition)` made of `ConcatSquash` layers.

    `dx/dt = f(t, x, condition)`

    The last layer is linear and has the width of the state.

    Args:
        hidden_units: the widths of the hidden layers, a sequence of integers. Defaults to `(64, 64)`.
        activation: the activation of the hidden layers, or its name. Choose a smooth one, because a flow
            differentiates it twice. Defaults to `"tanh"`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, a scalar tensor, or `(batch, 1)` if each sample has its own time. The field uses its value, so the
            unit and the origin of time matter.
        inputs: the state `x`.
        condition: the condition, `(batch, features)`, or `None`.

    Input shape:
        `(batch, features)`.

    Output shape:
        The same as the input shape.

    Masking:
        A mask has no effect, and the layer does not pass it on.

    Raises:
        ValueError: if there is no condition where the weights were made for one, for one where they were made for none,
            and for one with another number of features.

    Example:
        >>> flow = keras_node.ContinuousFlow(2, keras_node.ConcatSquashField((32, 32)))
        >>> flow.log_prob(tf.zeros((4, 2))).shape
        TensorShape([4])

    Reference:

        - Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models",
          arXiv:1810.01367.
    """

    def __init__(
        self, hidden_units: Sequence[int] = (64, 64), activation: str | Callable | None = "tanh", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_units = tuple(hidden_units)
        self.activation = keras.activations.get(activation)

    def build(self, t_shape: tuple, inputs_shape: tuple, condition_shape: tuple | None = None) -> None:
        self.num_features = 0 if condition_shape is None else condition_shape[-1]
        widths = (*self.hidden_units, inputs_shape[-1])
        activations = (*[self.activation] * len(self.hidden_units), None)
        self.layers = [
            ConcatSquash(units, activation, dtype=self.dtype_policy)
            for units, activation in zip(widths, activations, strict=True)
        ]
        for layer, features in zip(self.layers, (inputs_shape[-1], *self.hidden_units), strict=True):
            layer.build(t_shape, (None, features), condition_shape)
        keep_frozen(self)

    def call(self, t: tf.Tensor, inputs: tf.Tensor, condition: tf.Tensor | None) -> tf.Tensor:
        features = 0 if condition is None else condition.shape[-1]
        if features not in (self.num_features, None):
            made_for = f"conditions of shape (batch, {self.num_features})" if self.num_features else "no condition"
            raise ValueError(
                f"The weights of this field were made for {made_for}, and it takes no others. "
                f"Received: {'condition=None' if condition is None else f'condition.shape={tuple(condition.shape)}'}, "
                f"in layer {self.name!r}"
            )
        for layer in self.layers:
            inputs = layer(t, inputs, condition)
        return inputs

    def compute_output_shape(self, t_shape: tuple, inputs_shape: tuple, condition_shape: tuple | None = None) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(hidden_units=list(self.hidden_units), activation=keras.activations.serialize(self.activation))
        return config
