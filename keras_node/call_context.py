"""The call context of Keras, kept for computations that run after the call of a layer has ended."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


class _Training(keras.layers.Layer):
    """Returns the `training` that Keras passes to a layer that is called here."""

    def call(self, training: bool | None = None) -> bool | None:
        return training


# With the default of `dtype`, Keras would fix its global policy when this package is imported.
_training = _Training(name="training", dtype="float32")


class _WithoutAutocast(keras.layers.Layer):
    """Calls a function in which variables are read in their own precision."""

    def call(self, function: Callable[[], Any]) -> Any:
        return function()


_without_autocast = _WithoutAutocast(name="without_autocast", autocast=False, dtype="float32")


class _Called(keras.layers.Layer):
    """Calls a function inside a layer, so that layers in it take `training` and the precision of variables from it."""

    def call(self, function: Callable[[], Any], training: bool | None = None) -> Any:
        del training
        return function()


@dataclasses.dataclass(frozen=True)
class CallContext:
    """What layers and variables take from the layer that calls them.

    A gradient is computed after the call of that layer has ended. Without the context, layers inside a field would then
    run in inference mode, and variables would be read in another precision.

    Args:
        training: the `training` of layers that are called without it.
        autocast: the half precision in which float variables are read, or `None` for their own precision.
    """

    training: bool | None = None
    autocast: str | None = None

    @classmethod
    def current(cls, variables: Sequence[keras.Variable] = ()) -> "CallContext":
        """Returns the context at this place. It finds `autocast` by the dtype of `variables`, since Keras hides it."""
        for variable in variables:
            precision = keras.backend.standardize_dtype(variable.dtype)
            # The `dtype` of a variable is the precision in which Keras reads it at this place.
            if precision in ("float16", "bfloat16") and precision != _without_autocast(
                function=lambda v=variable: v.dtype
            ):
                return cls(_training(), precision)
        return cls(_training())

    def run(self, function: Callable[[], Any]) -> Any:
        """Calls `function` in this context, without AutoGraph as in the solve, and returns its result."""
        function = tf.autograph.experimental.do_not_convert(function)
        here = CallContext.current()
        if self == here:
            return function()
        policy = "float32" if self.autocast is None else f"mixed_{self.autocast}"
        # Each call needs a new layer: Keras ends a context when the layer that began it returns, even if that was a
        # nested call.
        called = _Called(name="called", dtype=policy, autocast=self.autocast is not None)
        try:
            return called(function=function, training=self.training)
        finally:
            if here.training is not None:
                _training(training=here.training)  # Keras would keep the value of the last layer
