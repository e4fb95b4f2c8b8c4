"""A vector field that depends on time, made of a layer that does not."""

from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_node.nested_layers import NestedLayers
from keras_node.signatures import FieldCall


@keras.saving.register_keras_serializable(package="keras_node")
class TimeConcatenationField(NestedLayers):
    """Makes a vector field `f(t, y)` out of an ordinary layer, which sees the time as one more channel.

    `f(t, y) = layer(concatenate([y, t]))`

    Args:
        layer: a Keras layer or model that maps `(batch, ..., features + 1)` to `(batch, ..., features)`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, a scalar, or `(batch, 1, ..., 1)` if each sample has its own time. The layer sees its value, so the
            unit and the origin of time matter.
        y: the state.
        y_mask: the mask of the state.

    Input shape:
        `t`: as above. `y`: `(batch, ..., features)`.

    Output shape:
        The same as the shape of `y`.

    Masking:
        The mask of the state is passed to a layer that takes `mask`. It has no other effect here, and the field does
        not pass it on.

    Raises:
        TypeError: if `layer` is not a Keras layer.

    Example:
        >>> network = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(8)])
        >>> layer = keras_node.ODELayer(keras_node.TimeConcatenationField(network))
        >>> layer(keras.random.normal((4, 8))).shape
        TensorShape([4, 8])

    Reference:

        - Chen, Rubanova, Bettencourt & Duvenaud (2018), "Neural Ordinary Differential Equations", arXiv:1806.07366. The
          MNIST example of its authors appends the time in this way.
    """

    nested: ClassVar = {"layer": "layer"}

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        # Without autocast, the time keeps its digits under a mixed policy. The layer inside casts its own input.
        super().__init__(autocast=False, **kwargs)
        if not isinstance(layer, keras.Layer):
            raise TypeError(
                "`layer` must be a Keras layer or model. A callable `f(t, y)` is a vector field already. "
                f"Received: layer={layer!r}"
            )
        self.layer = layer

    def call(self, t: tf.Tensor, y: tf.Tensor, y_mask: tf.Tensor | None = None) -> tf.Tensor:
        t = ops.cast(t, y.dtype) + ops.zeros_like(y[..., :1])
        return FieldCall(self.layer)(t, ops.concatenate([y, t], axis=-1), mask=y_mask)
