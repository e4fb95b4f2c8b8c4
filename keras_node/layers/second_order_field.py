"""Dynamics of second order as a vector field."""

from collections.abc import Callable
from typing import Any, ClassVar

import keras
import tensorflow as tf

from keras_node.nested_layers import NestedLayers
from keras_node.phase_space import halves, joined
from keras_node.signatures import FieldCall, like_state
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class SecondOrderField(NestedLayers):
    """The vector field of a second-order equation, computed from an acceleration.

    `dq/dt = v`

    `dv/dt = f(t, (q, v))`

    The state holds positions `q` and velocities `v`, either as the two halves of its last axis or as a tuple
    `(q, v)`.

    Args:
        acceleration: a Keras layer or model, or a registered callable, with the arguments `(y)` or `(t, y)`. It maps
            the state to the rate of change of the velocities, which has their shape.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time of the solve, in your unit. An acceleration `(y)` does not see it.
        y: the state, `(batch, ..., 2 * n)`, or a tuple of two tensors of the same shape.
        y_mask: the mask of the state.

    Input shape:
        `t`: a scalar, or `(batch, 1, ..., 1)` if each sample has its own time. `y`: as above.

    Output shape:
        The same as the shape of `y`.

    Masking:
        The mask of the state is passed to an acceleration that takes `mask`. It has no other effect, and the layer
        does not pass it on.

    Raises:
        ValueError: if the acceleration takes `args`, if it returns another shape than that of the velocities, or if
            the state has no two equal halves.

    Example:
        >>> spring = keras_node.SecondOrderField(lambda y: -y[..., :1])
        >>> half_a_period = keras_node.ODELayer(spring, t1=3.14159, solver=keras_node.RungeKutta(rtol=1e-6))
        >>> [round(float(x), 3) for x in half_a_period(tf.constant([[1.0, 0.5]]))[0]]
        [-1.0, -0.5]

    Reference:

        - Norcliffe et al. (2020), "On Second Order Behaviour in Augmented Neural ODEs", arXiv:2006.07220.
    """

    nested: ClassVar = {"acceleration": "acceleration"}

    def __init__(self, acceleration: keras.Layer | Callable, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        if FieldCall(acceleration).num_arguments == 3:
            raise ValueError(
                "An acceleration must take `(y)` or `(t, y)`, without further arguments. Remove its argument `args`. "
                f"Received: acceleration={acceleration!r}"
            )
        self.acceleration = acceleration

    def call(self, t: tf.Tensor, y: Nest, y_mask: Nest = None) -> Nest:
        _, v = halves(y)
        a = FieldCall(self.acceleration, y)(t, y, mask=y_mask)
        return joined(v, like_state(a, v, self.acceleration), y)
