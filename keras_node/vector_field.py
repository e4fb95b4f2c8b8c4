"""From a Keras layer or a callable to a pure function `f(t, y, params)`.

Inside a solve the field reads its variables through a `keras.StatelessScope`, so the solve sees every tensor
that it must differentiate, updates of state (seeds, moving averages) have no effect while it runs, and noise is
the same at every evaluation: a solve integrates one field.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.pure_function import RecordingScope, full_precision
from keras_node.signatures import FieldCall, build, like_state
from keras_node.trees import Nest


class VectorField:
    """A vector field for one solve, with its parameters explicit.

    Args:
        function: a Keras layer, or a callable, `f(y)`, `f(t, y)` or `f(t, y, args)`.
        t0: the first time, where a callable is evaluated once to see what it reads.
        y0: the initial state.
        args: nest of tensors handed to the field, or `None`.
        training: passed on where the field takes it.
        mask: that of the state, passed on where the field takes it.

    Attributes:
        params: the tensors that the field reads and a gradient may be asked for: the values of its trainable
            variables, then the float leaves of `args`.
        computes_in_float16: whether its rates, when last evaluated, came in a precision that overflows early.
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
        self._keywords = {"training": training, "mask": mask}
        self.args = tf.nest.map_structure(lambda a: _to_tensor(a, tf.nest.flatten(y0)[0].dtype), args)
        self._float_args = [a for a in tf.nest.flatten(self.args) if _is_float(a)]

        self._traced = None
        self._trainable, self._constant = [], []
        if isinstance(function, keras.Layer):
            if not function.built:
                build(function, trees.align(t0, tf.nest.flatten(y0)[0]), y0, self.args)
            self._trainable = list(function.trainable_variables)
            self._constant = list(function.non_trainable_variables)
        if self._constant or not isinstance(function, keras.Layer):
            self._advance_state(t0, y0)
        else:
            self._read_variables()

    @property
    def params(self) -> list[tf.Tensor]:
        return self._values + self._float_args

    def __call__(self, t: tf.Tensor, y: Nest, params: list[tf.Tensor]) -> Nest:
        """`f(t, y)` at the given parameters, in the structure, shapes and dtypes of `y`."""
        values, float_args = params[: len(self._values)], iter(params[len(self._values) :])
        args = trees.each(lambda a: next(float_args) if _is_float(a) else a, self.args)
        variables = self._trainable + self._constant
        mapping = list(zip(variables, values + self._constant_values, strict=True))
        with keras.StatelessScope(mapping, collect_losses=True, initialize_variables=False) as scope:
            dy = self._evaluate(t, y, args)
        if scope.losses:
            raise ValueError(
                "A vector field is evaluated at a solver's stages, where a loss has no meaning; activity regularizers "
                "and `add_loss` cannot be used inside it. Regularize weights, or integrate the loss as a part of the "
                f"state. Received: {self.function!r}, which adds {len(scope.losses)} loss(es) per evaluation"
            )
        return dy

    def closed_over(self, t: tf.Tensor, y: Nest) -> list[tf.Tensor]:
        """Float tensors that carry what the field reads beside its arguments and `params`.

        In a graph they are such tensors themselves. Eagerly nothing tells of them but the field's value, which is
        watched by a tape if one of them is.
        """
        if tf.executing_eagerly():
            return tf.nest.flatten(self(*trees.stop_gradient((t, y, self.params))))
        arguments, trace = self.trace(t, y)
        known = {id(x) for x in tf.nest.flatten((arguments, self.args, self._constant_values))}
        captured = [x for x in trace.captured_inputs if x.dtype.is_floating and id(x) not in known]
        return captured + [tf.convert_to_tensor(v) for v in trace.trainable_variables]

    def trace(self, t: tf.Tensor, y: Nest) -> tuple[tuple, Any]:
        """An evaluation as a graph of its own, and what it was made of; the first is kept for all who ask."""
        if self._traced is None:
            arguments = trees.stop_gradient((t, y, self.params))
            function = tf.function(lambda: self(*arguments), autograph=False)
            self._traced = arguments, function.get_concrete_function()
        return self._traced

    def _evaluate(self, t, y, args):
        with tf.name_scope("vector_field"):  # a layer's name may begin with "_", a scope's at the root may not
            dy = self._call(t, y, args, **self._keywords)
        self.computes_in_float16 = any(getattr(d, "dtype", None) == tf.float16 for d in tf.nest.flatten(dy))
        return like_state(dy, y, self.function)

    def _read_variables(self):
        self._values = [full_precision(v.value) for v in self._trainable]
        # A tape watches a frozen weight all the same, and would take it for a tensor that the field closes over.
        self._constant_values = [tf.stop_gradient(full_precision(v.value)) for v in self._constant]

    def _advance_state(self, t0, y0):
        """Evaluates the field once to learn which variables it reads and updates.

        A seed moves on by one solve. An update of anything else depends on the state, and has no meaning at
        the stages of a solver.
        """
        known = {id(v) for v in self._trainable + self._constant}
        scope = RecordingScope()
        with scope:
            self._evaluate(t0, trees.stop_gradient(y0), self.args)
        for variable in scope.read.values():
            if id(variable) not in known:
                (self._trainable if variable.trainable else self._constant).append(variable)
        self._read_variables()
        for variable, value in scope.updates:
            if not _is_seed(variable):
                raise ValueError(
                    f"A vector field cannot update state while it is integrated, and {variable.path!r} is "
                    "updated on every evaluation. For BatchNormalization, use LayerNormalization or "
                    "GroupNormalization inside the field, put the BatchNormalization before or after the ODE "
                    f"layer, or call the field with `training=False`. Received: {self.function!r}"
                )
            variable.assign(value)


def _to_tensor(x, dtype):
    if x is None or tf.is_tensor(x):
        return x
    if isinstance(x, keras.Variable | tf.Variable):
        return tf.convert_to_tensor(x)
    x = tf.convert_to_tensor(x)
    # A number or an array takes the state's precision; NumPy's default would not mix with float32.
    return tf.cast(x, dtype) if x.dtype.is_floating else x


def _is_float(x) -> bool:
    return tf.is_tensor(x) and x.dtype.is_floating


def _is_seed(variable) -> bool:
    return not tf.as_dtype(variable.dtype).is_floating
