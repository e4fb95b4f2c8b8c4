"""Dynamics of second order as a vector field."""

from typing import ClassVar

import keras
from keras import ops

from keras_node.nested_layers import NestedLayers
from keras_node.signatures import FieldCall, like_state


@keras.saving.register_keras_serializable(package="keras_node")
class SecondOrderField(NestedLayers, keras.layers.Layer):
    """The vector field of `q'' = f(q, q')`: positions that an acceleration moves.

    `dq/dt = v`

    `dv/dt = f(t, (q, v))`

    The state holds positions and velocities, in the halves of its last axis or as a tuple `(q, v)`.

    Args:
        acceleration: a Keras layer or model, or a registered callable, `(y)` or `(t, y)`, from the state to the rate of
            change of the velocities, in their shape.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time, which an acceleration `(y)` does not see.
        y: the state, `(batch, ..., 2 * n)`, or a tuple of two tensors of the same shape.
        y_mask: the mask of the state, handed on to an acceleration that takes `mask`.

    Input shape:
        `t` a scalar or `(batch, 1, ..., 1)`, `y` as above.

    Output shape:
        That of `y`.

    Example:
    >>> spring = keras_node.SecondOrderField(lambda y: -y[..., :1])
    >>> half_a_period = keras_node.ODELayer(spring, t1=3.14159, solver=keras_node.RungeKutta(rtol=1e-6))
    >>> [round(float(x), 3) for x in half_a_period(tf.constant([[1.0, 0.5]]))[0]]
    [-1.0, -0.5]

    Reference:

    - Norcliffe et al. (2020), "On Second Order Behaviour in Augmented Neural ODEs".
    """

    nested: ClassVar = {"acceleration": "acceleration"}

    def __init__(self, acceleration, **kwargs):
        super().__init__(autocast=False, **kwargs)
        if FieldCall(acceleration).num_arguments == 3:
            raise ValueError(f"An acceleration takes `(y)` or `(t, y)`. Received: acceleration={acceleration!r}")
        self.acceleration = acceleration

    def call(self, t, y, y_mask=None):
        _, v = halves(y)
        a = FieldCall(self.acceleration, y)(t, y, mask=y_mask)
        return joined(v, like_state(a, v, self.acceleration), y)


def halves(y):
    """The positions and their velocities or momenta: two leaves, or the halves of the last axis."""
    if isinstance(y, list | tuple):
        if len(y) == 2:
            return y
    elif y.shape[-1] is not None and y.shape[-1] % 2 == 0:
        return ops.split(y, 2, axis=-1)
    raise ValueError(
        "The state holds positions and as many velocities or momenta, in the halves of its last axis or as a tuple. "
        f"Received: {keras.tree.map_structure(lambda x: tuple(x.shape), y)}"
    )


def joined(first, second, like):
    """Two halves in the form of the state `like`."""
    return type(like)([first, second]) if isinstance(like, list | tuple) else ops.concatenate([first, second], axis=-1)
