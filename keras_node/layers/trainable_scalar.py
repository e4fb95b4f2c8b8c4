"""A number that is trained, such as a constant of physics."""

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node.arguments import number


@keras.saving.register_keras_serializable(package="keras_node")
class TrainableScalar(keras.layers.Layer):
    """A number that is trained together with the weights of a model, if you wish within bounds.

    `value = minimum + (initial - minimum) * exp(w)` with a `minimum`

    `value = maximum - (maximum - initial) * exp(w)` with a `maximum`

    `value = minimum + (maximum - minimum) * sigmoid(w)` with both

    `value = initial + size * w` with neither, where `size` is `|initial|`, or 1 if `initial` is 0

    The trained weight is `w`. A step of an optimizer therefore changes the value in proportion to its size, whether it
    is a thousandth or a million, so that one learning rate serves scalars and networks.

    A Keras layer may hold such scalars as attributes and read their `value` in its `call`. `keras_node.GreyBoxField`
    passes them to a function.

    Args:
        initial: the value before training, a number inside the bounds.
        minimum: the lower bound, a number below `initial`, or `None` (default) for no bound. With `minimum=0`, the
            value stays positive.
        maximum: the upper bound, a number above `initial`, or `None` (default) for no bound.
        **kwargs: arguments of `keras.layers.Layer`, such as `name`, `trainable` and `dtype`.

    Call arguments:
        This layer is not called. Read its attribute `value`.

    Input shape:
        There is no input.

    Output shape:
        `()`, the shape of `value`.

    Raises:
        ValueError: if `initial` is not finite, or not inside the bounds.

    Example:
        >>> gravity = keras_node.TrainableScalar(9.0, minimum=0.0)
        >>> float(gravity.value)
        9.0

    Reference:

        - Kucukelbir et al. (2017), "Automatic Differentiation Variational Inference", arXiv:1603.00788, section 2.3, on
          such transformations of bounded numbers.
    """

    def __init__(
        self, initial: float, minimum: float | None = None, maximum: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.initial = number("initial", initial)
        self.minimum = None if minimum is None else number("minimum", minimum)
        self.maximum = None if maximum is None else number("maximum", maximum)
        low, high = -math.inf if minimum is None else minimum, math.inf if maximum is None else maximum
        if not low < self.initial < high:
            raise ValueError(
                "`initial` must be finite, and inside the bounds. "
                f"Received: initial={initial}, minimum={minimum}, maximum={maximum}"
            )
        start = 0.0
        if minimum is not None and maximum is not None:
            part = (self.initial - low) / (high - low)
            start = math.log(part / (1 - part))
        self.w = self.add_weight(shape=(), initializer=keras.initializers.Constant(start), name="w")
        self.built = True

    @property
    def value(self) -> tf.Tensor:
        """The value, a scalar tensor in the precision of the weight."""
        w = ops.convert_to_tensor(self.w)
        if self.minimum is not None and self.maximum is not None:
            return self.minimum + (self.maximum - self.minimum) * ops.sigmoid(w)
        if self.minimum is not None:
            return self.minimum + (self.initial - self.minimum) * ops.exp(w)
        if self.maximum is not None:
            return self.maximum - (self.maximum - self.initial) * ops.exp(w)
        return self.initial + (abs(self.initial) or 1.0) * w

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(initial=self.initial, minimum=self.minimum, maximum=self.maximum)
        return config
