"""A vector field that depends on time, from a layer that does not."""

from typing import ClassVar

import keras
from keras import ops

from keras_node.nested_layers import NestedLayers
from keras_node.signatures import FieldCall


@keras.saving.register_keras_serializable(package="keras_node")
class TimeConcatenationField(NestedLayers, keras.layers.Layer):
    """Makes a vector field `f(t, y)` of an ordinary layer, which sees the time as one more channel.

    `f(t, y) = layer(concatenate([y, t]))`

    Args:
        layer: a Keras layer or model from `(batch, ..., features + 1)` to `(batch, ..., features)`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, a scalar, or `(batch, 1, ..., 1)` where samples have times of their own.
        y: the state.
        y_mask: the mask of the state, handed on to a layer that takes `mask`.

    Input shape:
        `t` as above, `y` `(batch, ..., features)`.

    Output shape:
        That of `y`.

    Example:
    >>> network = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(8)])
    >>> layer = keras_node.ODELayer(keras_node.TimeConcatenationField(network))
    >>> layer(keras.random.normal((4, 8))).shape
    TensorShape([4, 8])

    Reference:

    - Chen et al. (2018), "Neural Ordinary Differential Equations": the fields of its continuous normalizing flows.
    """

    nested: ClassVar = {"layer": "layer"}

    def __init__(self, layer, **kwargs):
        # Time keeps its digits under a mixed policy up to the layer, which casts for itself.
        super().__init__(autocast=False, **kwargs)
        if not isinstance(layer, keras.Layer):
            raise TypeError(f"`layer` must be a Keras layer or model. Received: layer={layer!r}")
        self.layer = layer

    def call(self, t, y, y_mask=None):
        t = ops.cast(t, y.dtype) + ops.zeros_like(y[..., :1])
        return FieldCall(self.layer)(t, ops.concatenate([y, t], axis=-1), mask=y_mask)
