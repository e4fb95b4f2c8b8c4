"""A network for states whose size is known from data."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node.nested_layers import keep_frozen


@keras.saving.register_keras_serializable(package="keras_node")
class ScaledNetwork(keras.layers.Layer):
    """The field `f(y) = scale * network((y - center) / scale)`, the default one of `keras_node.DynamicsModel`.

    Args:
        units: width of the two hidden layers.
        dim: length of the state.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.
    """

    def __init__(self, units: int, dim: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.units = units
        self.dim = dim
        self.center = self.add_weight(shape=(dim,), initializer="zeros", trainable=False, name="center")
        self.scale = self.add_weight(shape=(dim,), initializer="ones", trainable=False, name="scale")
        hidden = [keras.layers.Dense(units, activation="tanh", dtype=self.dtype_policy) for _ in range(2)]
        self.network = keras.Sequential([*hidden, keras.layers.Dense(dim, dtype=self.dtype_policy)])
        self.network.build((None, dim))
        self.built = True
        keep_frozen(self)

    def call(self, y: tf.Tensor) -> tf.Tensor:
        rates = self.network((y - self.center) / self.scale)
        return self.scale * ops.cast(rates, y.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "dim": self.dim}
