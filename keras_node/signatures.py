"""How to call a vector field, and what it must return.

A field is a callable, a Keras layer, or a functional model with several inputs. `FieldCall` gives them the same form.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node import trees
from keras_node.trees import Nest

_KEYWORDS = ("training", "mask")
_TIME = ("t", "time")  # names that tell an argument for the time, in particular one in a wrong place


class FieldCall:
    """A field `f(y)`, `f(t, y)` or `f(t, y, args)` that you can always call with `(t, y, args, training, mask)`.

    A functional model with several inputs is a field of `[t, y]` or `[t, y, args]`, or of a state that is a nest of as
    many tensors. It receives the time in the shape of its input, for example `(batch, 1)` for `keras.Input((1,))`.

    Args:
        function: a Keras layer or model, or a callable.
        y: a state, which tells whether the inputs of a functional model are `[t, y]` or a nest.
        role: what the function is, for messages.

    Attributes:
        num_arguments: how many of `y`, `t` and `args` the field takes: 1, 2 or 3.
        takes_training: whether the field takes `training`.
    """

    def __init__(
        self, function: keras.Layer | Callable[..., Nest], y: Nest = None, role: str = "A vector field"
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"{role} must be a Keras layer or a callable `f(y)`, `f(t, y)` or `f(t, y, args)`"
                + (", and not a class: make an instance of it. " if isinstance(function, type) else ". ")
                + f"Received: {function!r} (of type {type(function).__name__})"
            )
        parameters = inspect.signature(function.call if isinstance(function, keras.Layer) else function).parameters
        names = _positional(parameters)
        if not 1 <= len(names) <= 3:
            raise ValueError(
                f"{role} must take `(y)`, `(t, y)` or `(t, y, args)`. Change the arguments of the function. "
                f"Received: {function!r} with signature ({', '.join(parameters)})"
            )
        if len(names) > 1 and names[1] in _TIME and names[0] not in (*_TIME, "s", "tau") and names[0][0] != "_":
            order = ", ".join([names[1], names[0], *names[2:]])
            raise ValueError(
                f"{role} takes the time first: change the order of its arguments to ({order}), or the names if "
                f"`{names[1]}` is the state. "
                f"Received: {function!r} with signature ({', '.join(parameters)})"
            )
        self.function = function
        self.takes_training = isinstance(function, keras.Layer) or "training" in parameters
        state = names[min(1, len(names) - 1)]
        self._mask_name = next((name for name in ("mask", f"{state}_mask") if name in parameters), None)
        self._inputs = _several_inputs(function, y) if len(names) == 1 else None
        self.num_arguments = len(names) if self._inputs is None else len(self._inputs)

    def __call__(
        self, t: tf.Tensor, y: Nest, args: Any = None, training: bool | None = None, mask: Nest = None
    ) -> Nest:
        """Returns the value of the field. `t` is a scalar, or of shape `(batch,)` or `(batch, 1, ..., 1)`."""
        like = tf.nest.flatten(y)[0]
        if self._inputs is not None:
            t = _time_for(self._inputs[0], t, like)
        elif self.num_arguments > 1:
            t = trees.align(t, like)
        keywords = {}
        if self.takes_training and training is not None:
            keywords["training"] = training
        if self._mask_name is not None and mask is not None:
            keywords[self._mask_name] = mask
        return self.function(*self._arguments(t, y, args), **keywords)

    def check_args(self, args: Any) -> None:
        """Raises if there are `args` and the field takes none."""
        if args is not None and self.num_arguments < 3:
            raise ValueError(
                "`args` needs a vector field `f(t, y, args)`: add the argument to the field, or leave out `args`. "
                f"Received: args={args!r} for {self.function!r}, which takes {self.num_arguments} argument(s)"
            )

    @property
    def time_dtype(self) -> tf.DType | None:
        """The precision to which a functional model rounds the time, that of its input; `None` for other fields."""
        return None if self._inputs is None else tf.as_dtype(self._inputs[0].dtype)

    def build(self, t: tf.Tensor, y: Nest, args: Nest = None) -> Nest:
        """Builds a layer for arguments of these shapes, and returns the spec of its output."""
        t, y, args = (tf.nest.map_structure(_to_symbolic, x) for x in (t, y, args))
        if self._inputs is not None:
            t = _to_symbolic(self._inputs[0])
        layer: keras.Layer = self.function
        arguments = self._arguments(t, y, args)
        return layer.compute_output_spec(*arguments) if layer.built else layer(*arguments)

    def _arguments(self, t: tf.Tensor, y: Nest, args: Nest) -> tuple:
        if self.num_arguments == 1:
            return (y,)
        arguments = (t, y) if self.num_arguments == 2 else (t, y, args)
        return arguments if self._inputs is None else (list(arguments),)


def call_arguments(function: keras.Layer | Callable[..., Nest]) -> tuple[int, bool]:
    """Returns how many of `y`, `t` and `args` a field takes, and whether it takes `training`."""
    call = FieldCall(function)
    return call.num_arguments, call.takes_training


def build(layer: keras.Layer, t: tf.Tensor, y: Nest, args: Nest = None) -> None:
    """Builds a layer for arguments of these shapes, and checks that it returns a derivative of `y`."""
    like_state(FieldCall(layer, y).build(t, y, args), tf.nest.map_structure(_to_symbolic, y), layer)


def like_state(dy: Nest, y: Nest, function: Any, role: str = "A vector field", what: str = "rate of change") -> Nest:
    """Checks that the output `dy` of a field is a derivative of `y`, and casts it to the dtypes of `y`.

    `role` and `what` say for messages what the function is and what it returns.
    """
    if any(d is None for d in tf.nest.flatten(dy)):
        raise ValueError(
            f"{role} must return the {what} of the state: look for a `return` that is missing. "
            f"Received: {dy!r} from {function!r}"
        )
    try:
        tf.nest.assert_same_structure(y, dy)
    except (ValueError, TypeError) as error:
        numbers = tf.nest.is_nested(y) and all(a.shape.rank == 0 for a in tf.nest.flatten(y) if tf.is_tensor(a))
        hint = "A list of numbers is a list of that many states: pass an array if it is one. " if numbers else ""
        raise ValueError(
            f"{role} must return the {what} in the structure of the state. {hint}"
            f"Received: {_shapes(dy)} for a state of {_shapes(y)}, from {function!r}"
        ) from error

    def leaf(d: Any, a: tf.Tensor) -> tf.Tensor:
        # In eager mode, the checks below would take as long as an operation.
        if isinstance(d, tf.Tensor) and d.dtype == a.dtype and d.shape == a.shape and a.shape.is_fully_defined():
            return d
        symbolic = isinstance(d, keras.KerasTensor)
        if isinstance(d, tf.RaggedTensor | tf.SparseTensor):
            raise TypeError(
                f"{role} must return dense tensors: convert its output first. "
                f"Received: {type(d).__name__} from {function!r}"
            )
        d = d if symbolic else tf.convert_to_tensor(d)
        if not tf.as_dtype(d.dtype).is_floating:
            raise TypeError(
                f"{role} must return floating-point values: cast its output, for example to the dtype of `y`. "
                f"Received: dtype={tf.as_dtype(d.dtype).name} for a state of dtype {tf.as_dtype(a.dtype).name}, "
                f"from {function!r}"
            )
        if not tf.TensorShape(d.shape).is_compatible_with(a.shape):
            raise ValueError(
                f"{role} must return the shape of the state, because it returns its {what}. "
                f"Received: shape={tuple(d.shape)} for a state of shape {tuple(a.shape)}, from {function!r}"
            )
        if symbolic:
            return d
        # A layer may lose a part of the static shape, but the loop of a solve needs it.
        d = tf.cast(d, a.dtype)
        return d if d.shape.is_fully_defined() else tf.ensure_shape(d, a.shape)

    return trees.each(leaf, dy, y)


def _positional(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The names of the parameters that receive `t`, `y` and `args`."""
    positional = [
        p
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in _KEYWORDS
        and not p.name.endswith("_mask")
        and (p.default is p.empty or p.name == "args")
    ]
    # An `args` with a default counts only as the third argument, as in `f(t, y, args=None)`.
    if len(positional) == 2 and positional[-1].default is not inspect.Parameter.empty:
        positional.pop()
    return [p.name for p in positional]


def _several_inputs(function: Any, y: Nest) -> list | None:
    """The inputs of a functional model of `[t, y]` or `[t, y, args]`, and `None` for all other fields."""
    inputs = getattr(function, "inputs", None) if isinstance(function, keras.Model) else None
    if inputs is None or len(inputs) < 2:
        return None
    known = function.input  # in the structure that the model was made with
    if y is not None and len(tf.nest.flatten(y)) == len(inputs):
        return None
    if isinstance(known, list | tuple) and len(known) in (2, 3):
        return list(known)
    if y is None:
        return None
    raise ValueError(
        "A functional model that is a vector field must have the inputs `[t, y]` or `[t, y, args]`, or one input for "
        "each tensor of the state. "
        f"Received: {function!r} with inputs of shapes {_shapes(known)} for a state of {_shapes(y)}"
    )


def _time_for(spec: keras.KerasTensor, t: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The time in the shape of the input of a model: one value per sample, repeated along the axes of the state."""
    rank = len(spec.shape)
    if rank == 0:
        return t
    shape = ops.shape(like)
    axes = [size or shape[axis] for axis, size in enumerate(spec.shape[1:], start=1)]
    return ops.broadcast_to(ops.reshape(t, (-1,) + (1,) * (rank - 1)), (shape[0], *axes))


def _to_symbolic(x: Any) -> keras.KerasTensor | None:
    return None if x is None else keras.KerasTensor(x.shape, dtype=keras.backend.standardize_dtype(x.dtype))


def _shapes(nest: Nest) -> str:
    return str(tf.nest.map_structure(lambda x: tuple(getattr(x, "shape", ())), nest))
