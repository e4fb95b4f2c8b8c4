"""Equations that are known in part, as a vector field."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node.layers.trainable_scalar import TrainableScalar
from keras_node.signatures import FieldCall, like_state
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class GreyBoxField(keras.layers.Layer):
    """The vector field of a system that is known in part: equations whose constants are trained, and a network.

    `f(t, y) = known(t, y, **scalars) + network(t, y)`

    Leave out the network if you know all the equations, and only their constants are to be found.

    Args:
        known: the known part, a callable registered with `keras.saving.register_keras_serializable` (for saving; any
            callable can be trained). It takes `(y)`, `(t, y)` or `(t, y, args)` first, and then the scalars by their
            names. It returns the rate of change in the shape of `y`, with zeros for what it does not know.
        scalars: the constants of the known part, a dictionary from names to `keras_node.TrainableScalar` or to numbers.
            A number is trained without bounds from that value on. `known` receives scalar tensors in the precision of
            the state.
        network: the unknown part, a Keras layer or model with the arguments `(y)`, `(t, y)` or `(t, y, args)`, which
            returns the shape of `y`. Defaults to `None`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        t: the time of the solve, in your unit.
        y: the state.
        args: the arguments of the solve, such as a `keras_node.ControlPath`, for parts that take them.
        y_mask: the mask of the state.

    Input shape:
        `t`: a scalar, or `(batch, 1, ..., 1)` if each sample has its own time. `y`: `(batch, ...)`, or a nest.

    Output shape:
        The same as the shape of `y`.

    Masking:
        The mask of the state is passed to a network that takes `mask`. It has no other effect, and the layer does not
        pass it on.

    Raises:
        ValueError: if `known` has no argument of the name of a scalar, or further arguments that are not scalars, and
            if a part returns another shape than that of `y`.

    Example:
        A pendulum whose friction is unknown:

        >>> def pendulum(y, gravity):
        ...     angle, velocity = y[..., :1], y[..., 1:]
        ...     return keras.ops.concatenate([velocity, -gravity * keras.ops.sin(angle)], axis=-1)
        >>> network = keras.Sequential([keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(2)])
        >>> gravity = keras_node.TrainableScalar(5.0, minimum=0.0)
        >>> field = keras_node.GreyBoxField(pendulum, {"gravity": gravity}, network)
        >>> keras_node.ODELayer(field)(tf.ones((3, 2))).shape
        TensorShape([3, 2])
        >>> float(field.scalars["gravity"].value)
        5.0

    Reference:

        - Rackauckas et al. (2020), "Universal Differential Equations for Scientific Machine Learning",
          arXiv:2001.04385.
        - Yin et al. (2021), "Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting",
          arXiv:2010.04456.
    """

    def __init__(
        self,
        known: Callable,
        scalars: Mapping[str, TrainableScalar | float],
        network: keras.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        # Without autocast, the state keeps its precision under a mixed policy. The network casts its own input.
        super().__init__(autocast=False, **kwargs)
        self.known = known
        self.scalars = {
            name: scalar
            if isinstance(scalar, TrainableScalar)
            else TrainableScalar(scalar, name=name, dtype=self.variable_dtype)
            for name, scalar in scalars.items()
        }
        self.network = network
        self._check_names()

    def call(self, t: tf.Tensor, y: Nest, args: Any = None, y_mask: Nest = None) -> Nest:
        dtype = tf.nest.flatten(y)[0].dtype
        values = {name: ops.cast(scalar.value, dtype) for name, scalar in self.scalars.items()}
        rates = like_state(self._known_with(values)(t, y, args), y, self.known)
        if self.network is None:
            return rates
        more = FieldCall(self.network, y)(t, y, args, mask=y_mask)
        return tf.nest.map_structure(ops.add, rates, like_state(more, y, self.network))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            known=keras.saving.serialize_keras_object(self.known),
            scalars={name: keras.saving.serialize_keras_object(scalar) for name, scalar in self.scalars.items()},
            network=keras.saving.serialize_keras_object(self.network),
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GreyBoxField":
        deserialize = keras.saving.deserialize_keras_object
        scalars = {name: deserialize(scalar) for name, scalar in config["scalars"].items()}
        parts = {"known": deserialize(config["known"]), "network": deserialize(config["network"])}
        return cls(**{**config, **parts, "scalars": scalars})

    def _known_with(self, values: Mapping[str, Any]) -> FieldCall:
        """The known part as a field without scalars, for some values of these."""
        return FieldCall(functools.partial(self.known, **values), role="The known part of a field")

    def _check_names(self) -> None:
        parameters = inspect.signature(self.known).parameters
        missing = [name for name in self.scalars if name not in parameters]
        if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(
                "`known` must take every scalar by its name, after `(y)`, `(t, y)` or `(t, y, args)`. "
                f"Received: known{inspect.signature(self.known)} with the scalars {list(self.scalars)}"
            )
        self._known_with(self.scalars)  # raises for other arguments
