"""The gated recurrent unit in continuous time, as a vector field."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops


@keras.saving.register_keras_serializable(package="keras_node")
class GRUODEField(keras.layers.Layer):
    """The vector field of GRU-ODE, which turns one step of a GRU cell into a rate of change.

    `r, z = sigmoid(h U + b)`

    `n = tanh((r * h) U_n + b_n)`

    `dh/dt = (1 - z) * (n - h)`

    A state that starts between -1 and 1 stays there for any time. If you solve the field backward in time, it may leave
    this range.

    Args:
        use_bias: whether the gates have biases. Defaults to `True`.
        kernel_initializer: initializer of `U` and `U_n`. Defaults to `"orthogonal"`.
        bias_initializer: initializer of `b` and `b_n`. Defaults to `"zeros"`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: the state `h`. The field does not see the time. The state needs one unit of time or more to follow a
            change (its time constant is 1 or more), so scale your times until typical intervals are near 1.

    Input shape:
        `(batch, ..., units)`.

    Output shape:
        The same as the input shape.

    Masking:
        A mask has no effect, and the layer does not pass it on.

    Example:
        >>> layer = keras_node.ODELayer(keras_node.GRUODEField(), t1=10.0)
        >>> h = layer(keras.random.uniform((4, 8), -1.0, 1.0))
        >>> bool(keras.ops.all(keras.ops.abs(h) < 1))
        True
        >>> cell = keras_node.ODERNNCell(keras.layers.GRUCell(8), keras_node.GRUODEField())

    Reference:

        - De Brouwer, Simm, Arany & Moreau (2019), "GRU-ODE-Bayes: Continuous Modeling of Sporadically-Observed Time
          Series", arXiv:1905.12374: the field without inputs (autonomous GRU-ODE).
    """

    def __init__(
        self,
        use_bias: bool = True,
        kernel_initializer: str | dict | Callable = "orthogonal",
        bias_initializer: str | dict | Callable = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: tuple) -> None:
        units = input_shape[-1]
        self.kernel = self.add_weight(shape=(units, 3 * units), initializer=self.kernel_initializer, name="kernel")
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(shape=(3 * units,), initializer=self.bias_initializer, name="bias")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        h, gates = inputs, 2 * inputs.shape[-1]  # the columns of r and z come before those of n
        r, z = ops.split(ops.sigmoid(self._affine(h, slice(None, gates))), 2, axis=-1)
        n = ops.tanh(self._affine(r * h, slice(gates, None)))
        return (1 - z) * (n - h)

    def _affine(self, x: tf.Tensor, columns: slice) -> tf.Tensor:
        x = ops.matmul(x, self.kernel[:, columns])
        return x if self.bias is None else x + self.bias[columns]

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            use_bias=self.use_bias,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
        )
        return config
