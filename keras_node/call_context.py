"""What Keras knows while a layer is called, kept for what is computed after the call has ended."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras


class _Training(keras.layers.Layer):
    """Returns the `training` that Keras hands to a layer which is called here."""

    def call(self, training=None):
        return training


_training = _Training(name="training")


class _WithoutAutocast(keras.layers.Layer):
    """Calls a function with variables in their own precision."""

    def call(self, function):
        return function()


_without_autocast = _WithoutAutocast(name="without_autocast", autocast=False)


class _Called(keras.layers.Layer):
    """Calls a function as a layer calls others: they take `training` and the precision of variables from it."""

    def call(self, function, training=None):
        del training
        return function()


@dataclasses.dataclass(frozen=True)
class CallContext:
    """What layers and variables take from the layer that calls them.

    A gradient is computed after that layer's call has ended. Without its context, layers inside a field would be in
    inference mode there, and variables would come in another precision.

    Args:
        training: what a layer's `training` is if it is not told.
        autocast: the half precision in which float variables are read, or `None` for their own.
    """

    training: bool | None = None
    autocast: str | None = None

    @classmethod
    def current(cls, variables: Sequence[keras.Variable] = ()) -> "CallContext":
        """The context at this place. Its `autocast` shows only in variables that are read here."""
        for variable in variables:
            precision = keras.backend.standardize_dtype(variable.dtype)
            # What Keras says of a variable's dtype is what it is read in.
            if precision in ("float16", "bfloat16") and precision != _without_autocast(
                function=lambda v=variable: v.dtype
            ):
                return cls(_training(), precision)
        return cls(_training())

    def run(self, function: Callable[[], Any]) -> Any:
        """`function()`, in this context."""
        here = CallContext.current()
        if self == here:
            return function()
        policy = "float32" if self.autocast is None else f"mixed_{self.autocast}"
        # A new layer each time: Keras ends a context when the layer that began it returns, even from a nested call.
        called = _Called(name="called", dtype=policy, autocast=self.autocast is not None)
        try:
            return called(function=function, training=self.training)
        finally:
            if here.training is not None:
                _training(training=here.training)  # Keras leaves the last value that a layer was given
