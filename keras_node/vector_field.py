"""From a Keras layer or a callable to a pure function `f(t, y, params)`.

A solve integrates one field: `PureFunction` sees to it that every evaluation, of the solve and of its gradient, is with
the same weights and the same noise, and that the solve knows every tensor it must differentiate.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.pure_function import PureFunction, is_seed
from keras_node.signatures import FieldCall, build, like_state
from keras_node.trees import Nest


class VectorField:
    """A vector field for one solve, with everything that it depends on made explicit.

    Args:
        function: a Keras layer, or a callable, `f(y)`, `f(t, y)` or `f(t, y, args)`.
        t0: the first time, at which it is evaluated once to see what it reads.
        y0: the initial state.
        args: nest of tensors handed to the field, or `None`.
        training: handed to a callable that takes it; layers take it from the call context.
        mask: that of the state, handed to a field that takes it.

    Attributes:
        pure: the field as a `PureFunction`.
        params: the tensors that the field reads and a gradient may be asked for: the float leaves of `args`, then the
            `params` of `pure`.
        precision: the lowest precision in which its rates came when it was last evaluated.
    """

    def __init__(
        self,
        function: keras.Layer | Callable,
        t0: tf.Tensor,
        y0: Nest,
        args: Any = None,
        training: bool | None = None,
        mask: Nest = None,
    ):
        self.function = function
        self._call = FieldCall(function, y0)
        if args is not None and self._call.num_arguments < 3:
            raise ValueError(
                "`args` needs a vector field `f(t, y, args)`. "
                f"Received: args={args!r} for {function!r}, which takes {self._call.num_arguments} argument(s)"
            )
        is_layer = isinstance(function, keras.Layer)
        self._keywords = {"training": None if is_layer else training, "mask": mask}
        self.args = tf.nest.map_structure(lambda a: _to_tensor(a, tf.nest.flatten(y0)[0].dtype), args)
        self._float_args = [a for a in tf.nest.flatten(self.args) if _is_float(a)]
        variables = []
        if is_layer:
            if not function.built:
                build(function, trees.align(t0, tf.nest.flatten(y0)[0]), y0, self.args)
            # All of them, since a field may read others later than at the start.
            variables = [*function.trainable_variables, *function.non_trainable_variables]
        constants = trees.each(lambda a: tf.stop_gradient(a) if _is_float(a) else a, self.args)
        self.pure = PureFunction(self._evaluate, *trees.stop_gradient((t0, y0)), constants, variables=variables)
        self.params = self._float_args + self.pure.params
        self._check_losses()
        self._check_weights()
        self._advance_seeds()

    def __call__(self, t: tf.Tensor, y: Nest, params: list[tf.Tensor]) -> Nest:
        """`f(t, y)` at the given parameters, in the structure, shapes and dtypes of `y`."""
        float_args = iter(params)
        args = trees.each(lambda a: next(float_args) if _is_float(a) else a, self.args)
        dy, _ = self.pure(list(float_args), self.pure.carried, t, y, args)
        return dy

    def sources(self, params: list) -> list:
        """What a tape must watch, and be asked for, to differentiate with respect to `params`."""
        number = len(self._float_args)
        return [*params[:number], *self.pure.sources(params[number:])]

    def also_reading(self, variables: Sequence[tf.Variable]) -> "VectorField":
        """The same field where the values of `variables`, which it reads by itself, are the last of `params`."""
        other = copy.copy(self)
        other.pure = self.pure.also_reading(variables)
        other.params = self._float_args + other.pure.params
        return other

    def _evaluate(self, t, y, args):
        with tf.name_scope("vector_field"):  # a layer's name may begin with "_", a scope's at the root may not
            dy = self._call(t, y, args, **self._keywords)
        precisions = [d.dtype for d in tf.nest.flatten(dy) if _is_float(d)]
        self.precision = min(precisions, key=lambda dtype: dtype.size, default=None)
        return like_state(dy, y, self.function)

    def _check_losses(self):
        if self.pure.losses:
            raise ValueError(
                "A vector field is evaluated at a solver's stages, where a loss has no meaning; activity regularizers "
                "and `add_loss` cannot be used inside it. Regularize weights, or integrate the loss as a part of the "
                f"state. Received: {self.function!r}, which adds {len(self.pure.losses)} loss(es) per evaluation"
            )

    def _check_weights(self):
        call = getattr(self.function, "call", None)
        if not isinstance(call, tf.types.experimental.GenericFunction):
            return
        if self.pure.reads_none_of(self.function.trainable_variables):
            raise ValueError(
                "The `call` of this layer is a `tf.function`. It was traced before the layer's weights had values, and "
                "will never read them. Remove the decorator; a solve is part of a graph wherever the model is. "
                f"Received: {self.function!r}"
            )

    def _advance_seeds(self):
        """Moves seeds on by one solve. Any other update depends on the state, and has no meaning at a stage."""
        for variable, value in self.pure.updates:
            if not is_seed(variable):
                raise ValueError(
                    f"A vector field cannot update state while it is integrated, and {variable.path!r} is "
                    "updated on every evaluation. For BatchNormalization, use LayerNormalization or "
                    "GroupNormalization inside the field, put the BatchNormalization before or after the ODE "
                    "layer, or call the field with `training=False`. Update a metric outside the field. "
                    f"Received: {self.function!r}"
                )
            variable.assign(value)


def _to_tensor(x, dtype):
    if isinstance(x, keras.Variable | tf.Variable):  # which `tf.is_tensor` may take for a tensor
        return tf.convert_to_tensor(x)
    if x is None or tf.is_tensor(x):
        return x
    x = tf.convert_to_tensor(x)
    # A number or an array takes the state's precision; NumPy's default would not mix with float32.
    return tf.cast(x, dtype) if x.dtype.is_floating else x


def _is_float(x) -> bool:
    return tf.is_tensor(x) and x.dtype.is_floating
