"""Dynamics that conserve an energy, as a vector field."""

from collections.abc import Callable
from typing import Any, ClassVar

import keras
import tensorflow as tf

from keras_node.nested_layers import NestedLayers
from keras_node.phase_space import halves, joined
from keras_node.signatures import FieldCall
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class HamiltonianField(NestedLayers):
    """The vector field of Hamilton's equations, computed from a scalar energy `H(q, p)`.

    `dq/dt = dH/dp`

    `dp/dt = -dH/dq`

    If the energy does not depend on time, the exact solution conserves it. The solution of a solver drifts away from
    it: tighter tolerances make the drift slower. The state holds positions and momenta, either as the two halves of
    its last axis or as a tuple `(q, p)`.

    Args:
        energy: a Keras layer or model, or a registered callable, with the arguments `(y)` or `(t, y)`. It maps the
            state to one number for each sample, `(batch,)`, or to one number at each position, `(batch, ..., 1)`, and
            these are added up. The field is its derivative, so use smooth activations such as `"tanh"` or
            `"softplus"`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time of the solve, in your unit. An energy `(y)` does not see it.
        y: the state, `(batch, ..., 2 * n)`, or a tuple of two tensors of the same shape.
        y_mask: the mask of the state.

    Input shape:
        `t`: a scalar, or `(batch, 1, ..., 1)` if each sample has its own time. `y`: as above.

    Output shape:
        The same as the shape of `y`.

    Masking:
        The mask of the state is passed to an energy that takes `mask`. It has no other effect, and the layer does not
        pass it on.

    Raises:
        ValueError: if the energy takes `args`, if it returns more than one number at each position, or if the state
            has no two equal halves.

    Example:
        >>> energy = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(1)])
        >>> field = keras_node.HamiltonianField(energy)
        >>> layer = keras_node.ODELayer(field, solver=keras_node.RungeKutta(rtol=1e-6))
        >>> y = keras.random.normal((4, 2))
        >>> bool(keras.ops.all(keras.ops.abs(energy(layer(y)) - energy(y)) < 1e-4))
        True

    Reference:

        - Greydanus, Dzamba & Yosinski (2019), "Hamiltonian Neural Networks", arXiv:1906.01563.
    """

    nested: ClassVar = {"energy": "energy"}

    def __init__(self, energy: keras.Layer | Callable, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        if FieldCall(energy).num_arguments == 3:
            raise ValueError(
                "An energy must take `(y)` or `(t, y)`, without further arguments. Remove its argument `args`. "
                f"Received: energy={energy!r}"
            )
        self.energy = energy

    def call(self, t: tf.Tensor, y: Nest, y_mask: Nest = None) -> Nest:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(y)
            energy = FieldCall(self.energy, y)(t, y, mask=y_mask)
        rank = len(energy.shape)
        if rank == 0 or (rank > 1 and energy.shape[-1] != 1):
            raise ValueError(
                "An energy must return one number for each sample, with shape (batch,) or (batch, ..., 1). End it with "
                "a layer of one unit, for example. "
                f"Received: shape={tuple(energy.shape)} from {self.energy!r}"
            )
        slopes = tape.gradient(energy, y, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        dq, dp = halves(slopes)
        return joined(dp, -dq, y)
