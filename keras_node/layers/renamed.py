"""Layers under their former names. Code and saved models that use these names keep working."""

import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_node.layers.second_order_field import SecondOrderField
from keras_node.layers.time_concatenation_field import TimeConcatenationField


@keras.saving.register_keras_serializable(package="keras_node")
class SecondOrder(SecondOrderField):
    """The former name of `keras_node.SecondOrderField`, which does the same. Using it warns.

    Args:
        acceleration: as in `keras_node.SecondOrderField`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.
    """

    def __init__(self, acceleration: keras.Layer | Callable, **kwargs: Any) -> None:
        _warn("SecondOrder", "SecondOrderField")
        super().__init__(acceleration, **kwargs)


@keras.saving.register_keras_serializable(package="keras_node")
class TimeConcatenation(TimeConcatenationField):
    """The former name of `keras_node.TimeConcatenationField`, which does the same. Using it warns.

    Args:
        layer: as in `keras_node.TimeConcatenationField`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.
    """

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        _warn("TimeConcatenation", "TimeConcatenationField")
        super().__init__(layer, **kwargs)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"keras_node.{old} is now called keras_node.{new}; please use the new name", DeprecationWarning, stacklevel=3
    )
