"""Layers that contain other layers, and are saved together with them."""

import operator
from typing import Any, ClassVar

import keras


def keep_frozen(layer: keras.layers.Layer) -> None:
    """Freezes the layers in a frozen layer: Keras tells those that the layer already has, but not those made later."""
    if not layer.trainable:
        layer.trainable = True  # to set what it is already would do nothing
        layer.trainable = False


class NestedLayers(keras.layers.Layer):
    """A layer with constructor arguments that are layers or registered callables, which its config includes.

    Attributes:
        nested: for each such argument, its name and the attribute path under which the layer keeps it.
    """

    nested: ClassVar[dict[str, str]] = {"vector_field": "vector_field"}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for name, place in self.nested.items():
            config[name] = keras.saving.serialize_keras_object(operator.attrgetter(place)(self))
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        layers = {name: keras.saving.deserialize_keras_object(config[name]) for name in cls.nested if name in config}
        return cls(**{**config, **layers})
