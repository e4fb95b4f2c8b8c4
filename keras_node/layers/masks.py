"""Masks of the states that a layer returns."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node.layers.call_times import shape_of
from keras_node.trees import Nest


class Masked(keras.layers.Layer):
    """Returns its input with the mask that it is called with."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.built = True  # `quantize` needs every layer to be built

    def call(self, x: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
        return x

    def compute_output_spec(self, x: keras.KerasTensor, mask: Any = None) -> keras.KerasTensor:
        return x


def known(mask: Nest) -> Nest:
    """Returns a nest of masks, or `None` if all its masks are `None`."""
    return None if all(m is None for m in tf.nest.flatten(mask)) else mask


def with_mask(masked: Masked, outputs: Nest, mask: Nest, ts: Any) -> Nest:
    """Returns the outputs with the mask of the inputs, which is repeated for each time in `ts`."""
    if mask is None:
        return outputs

    def leaf(y: Any, mask: Any) -> Any:
        if mask is not None and ts is not None:
            mask = ops.repeat(ops.expand_dims(mask, 1), shape_of(ts)[-1] or ops.shape(ts)[-1], axis=1)
        return y if mask is None else masked(y, mask=mask)

    return tf.nest.map_structure(leaf, outputs, mask)
