"""Turns a Keras layer or a callable into a pure function `f(t, y, params)`.

A solve must integrate the same field all the time. `PureFunction` makes sure that all evaluations, in the solve and in
its gradient, use the same weights and the same noise, and it finds every tensor that may need a gradient.
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
    """A vector field for one solve. It holds explicitly every tensor on which it depends.

    Args:
        function: a Keras layer, or a callable, `f(y)`, `f(t, y)` or `f(t, y, args)`.
        t0: the first time. The field is evaluated there once, to see what it reads.
        y0: the initial state.
        args: nest of tensors that is passed to the field, or `None`.
        training: passed to a callable that takes it. Layers take it from the call context.
        mask: the mask of the state, passed to a field that takes it.
        jacobian: a callable that returns the Jacobian of the field, with the arguments of a field. By default it is the
            method `jacobian` of `function`, if there is one.

    Attributes:
        pure: the field as a `PureFunction`.
        params: the tensors that the field reads and that may need a gradient: first the float leaves of `args`, then
            the `params` of `pure`.
        precision: the lowest precision of the rates that the field returned in its last evaluation, before they were
            cast to that of the state, and of the time that a functional model takes.
        has_jacobian: whether the Jacobian is given.
    """

    precision: tf.DType | None

    def __init__(
        self,
        function: keras.Layer | Callable[..., Nest],
        t0: tf.Tensor,
        y0: Nest,
        args: Nest = None,
        training: bool | None = None,
        mask: Nest = None,
        jacobian: Callable[..., tf.Tensor] | None = None,
    ) -> None:
        self.function = function
        self._call = FieldCall(function, y0)
        self._jacobian = getattr(function, "jacobian", None) if jacobian is None else jacobian
        self.has_jacobian = callable(self._jacobian)
        self._call.check_args(args)
        self._keywords = {"training": None if isinstance(function, keras.Layer) else training, "mask": mask}
        self.args = as_tensors(args, tf.nest.flatten(y0)[0].dtype)
        self._float_args = [a for a in tf.nest.flatten(self.args) if trees.is_float(a)]
        variables: list[keras.Variable] = []
        if isinstance(function, keras.Layer):
            if not function.built:
                build(function, trees.align(t0, tf.nest.flatten(y0)[0]), y0, self.args)
            # Take all variables, because the field may read other ones later than at the start.
            variables = [*function.trainable_variables, *function.non_trainable_variables]
        constants = trees.constants((t0, y0, self.args))
        self.pure = PureFunction(self._evaluate, *constants, variables=variables)
        self.params = self._float_args + self.pure.params
        self._check_losses()
        self._check_weights()
        self._advance_seeds()

    def __call__(self, t: tf.Tensor, y: Nest, params: list[tf.Tensor]) -> Nest:
        """Returns `f(t, y)` for these parameters, in the structure, shapes and dtypes of `y`."""
        return self._with(params, t, y)

    def jacobian(self, t: tf.Tensor, y: Nest, params: list[tf.Tensor]) -> tf.Tensor:
        """Returns the Jacobian that is given, for these parameters."""

        def evaluate(t: tf.Tensor, y: Nest, args: Nest) -> tf.Tensor:
            # An explicit method does not get here. Its field may have a method of this name for another purpose.
            assert self._jacobian is not None
            with tf.name_scope("jacobian"):
                value = FieldCall(self._jacobian)(t, y, args, **self._keywords)
            if value is None:
                raise ValueError(
                    "A Jacobian must return a matrix for each sample: look for a `return` that is missing. "
                    f"Received: None from {self._jacobian!r}"
                )
            return value

        return self._with(params, t, y, evaluate)

    def _with(self, params: list[tf.Tensor], t: tf.Tensor, y: Nest, function: Callable[..., Any] | None = None) -> Any:
        """Evaluates the field, or another function of the same arguments, for these parameters."""
        float_args = iter(params)
        args = trees.each(lambda a: next(float_args) if trees.is_float(a) else a, self.args)
        result, _ = self.pure(list(float_args), self.pure.carried, t, y, args, function=function)
        return result

    @property
    def may_overflow(self) -> bool:
        """Whether the field computes in float16, where gradients that are large for another reason overflow."""
        if self.pure.trace is None:
            # In eager mode nothing tells what the inner layers do, but mostly they do what the policy says.
            return self.precision == tf.float16 or keras.config.dtype_policy().compute_dtype == "float16"
        half = tf.float16.as_datatype_enum
        return any(attribute.type == half for node in self.pure.nodes for attribute in node.attr.values())

    def sources(self, params: list[tf.Tensor]) -> list[tf.Tensor | tf.Variable]:
        """Returns what a tape must watch and differentiate by, for the gradients of `params`."""
        number = len(self._float_args)
        return [*params[:number], *self.pure.sources(params[number:])]

    def also_reading(self, variables: Sequence[tf.Variable]) -> "VectorField":
        """Returns the same field, with the values of `variables`, which it reads by itself, at the end of `params`."""
        other = copy.copy(self)
        other.pure = self.pure.also_reading(variables)
        other.params = self._float_args + other.pure.params
        return other

    def _evaluate(self, t: tf.Tensor, y: Nest, args: Nest) -> Nest:
        # The name of a layer may begin with "_", but that of the outermost scope may not.
        with tf.name_scope("vector_field"):
            dy = self._call(t, y, args, **self._keywords)
        precisions = [d.dtype for d in tf.nest.flatten(dy) if trees.is_float(d)]
        if self._call.time_dtype is not None:
            precisions.append(self._call.time_dtype)
        self.precision = min(precisions, key=lambda dtype: dtype.size, default=None)
        return like_state(dy, y, self.function)

    def _check_losses(self) -> None:
        if self.pure.losses:
            raise ValueError(
                "A vector field cannot add losses, because they have no meaning at the stages of a solver: remove "
                "activity regularizers and `add_loss`. Regularize weights, or make the loss a part of the state. "
                f"Received: {self.function!r}, which adds {len(self.pure.losses)} loss(es) per evaluation"
            )

    def _check_weights(self) -> None:
        layer: keras.Layer = self.function
        call = getattr(layer, "call", None)
        if not isinstance(call, tf.types.experimental.GenericFunction):
            return
        if self.pure.reads_none_of(layer.trainable_variables):
            raise ValueError(
                "The `call` of this layer is a `tf.function`. It was traced before the layer's weights had values, and "
                "never reads them. Remove the decorator: if the model runs in a graph, the solve does too. "
                f"Received: {self.function!r}"
            )

    def _advance_seeds(self) -> None:
        """Updates seeds once per solve. Any other update depends on the state, and has no meaning at a stage."""
        for variable, value in self.pure.updates:
            if not is_seed(variable):
                raise ValueError(
                    f"A vector field cannot update a state during a solve, but it updates {variable.path!r} at every "
                    "evaluation. Instead of BatchNormalization, use LayerNormalization or GroupNormalization inside "
                    "the field, put the BatchNormalization before or after the ODE layer, or call the field with "
                    "`training=False`. Update a metric outside the field. "
                    f"Received: {self.function!r}"
                )
            variable.assign(value)


def as_tensors(args: Nest, dtype: tf.DType) -> Nest:
    """Returns `args` as tensors. Numbers and arrays take the precision `dtype` of the state."""
    return tf.nest.map_structure(lambda a: _to_tensor(a, dtype), args)


def _to_tensor(x: Any, dtype: tf.DType) -> tf.Tensor | None:
    if isinstance(x, keras.Variable | tf.Variable):  # `tf.is_tensor` may be true for a variable
        return tf.convert_to_tensor(x)
    if x is None or tf.is_tensor(x):
        return x
    x = tf.convert_to_tensor(x)
    # Numbers and arrays take the precision of the state: the default of NumPy, float64, does not mix with float32.
    return tf.cast(x, dtype) if x.dtype.is_floating else x
