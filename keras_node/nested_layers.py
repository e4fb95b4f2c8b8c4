"""Layers that are made of other layers, and are saved with them."""

import operator
from typing import ClassVar

import keras


class NestedLayers:
    """For a layer with arguments that are layers, or registered callables: they are part of its config.

    Attributes:
        nested: the names of these arguments, and where the layer keeps them.
    """

    nested: ClassVar[dict[str, str]] = {"vector_field": "vector_field"}

    def get_config(self):
        config = super().get_config()
        for name, place in self.nested.items():
            config[name] = keras.saving.serialize_keras_object(operator.attrgetter(place)(self))
        return config

    @classmethod
    def from_config(cls, config):
        layers = {name: keras.saving.deserialize_keras_object(config[name]) for name in cls.nested if name in config}
        return cls(**{**config, **layers})
