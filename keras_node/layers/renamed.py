"""Layers under the names that they had before. Code that uses these names, and files that hold them, keep working."""

import warnings

import keras

from keras_node.layers.second_order_field import SecondOrderField
from keras_node.layers.time_concatenation_field import TimeConcatenationField


@keras.saving.register_keras_serializable(package="keras_node")
class SecondOrder(SecondOrderField):
    """The former name of `keras_node.SecondOrderField`."""

    def __init__(self, acceleration, **kwargs):
        _warn("SecondOrder", "SecondOrderField")
        super().__init__(acceleration, **kwargs)


@keras.saving.register_keras_serializable(package="keras_node")
class TimeConcatenation(TimeConcatenationField):
    """The former name of `keras_node.TimeConcatenationField`."""

    def __init__(self, layer, **kwargs):
        _warn("TimeConcatenation", "TimeConcatenationField")
        super().__init__(layer, **kwargs)


def _warn(old, new):
    warnings.warn(f"keras_node.{old} is now called keras_node.{new}", DeprecationWarning, stacklevel=3)
