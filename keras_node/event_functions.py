"""Event functions and resets in a solve: constants to look for an event, and differentiable once it is found."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.event_detector import value_and_rate
from keras_node.events import Event
from keras_node.pure_function import PureFunction, is_seed
from keras_node.signatures import FieldCall, call_arguments, like_state
from keras_node.trees import Nest


class EventFunctions:
    """The functions and resets of several events, for one solve.

    Args:
        events: the events.
        t0: the first time of every sample, `(batch,)`.
        y0: the initial state.
        args: nest of tensors for functions that take it, or `None`.
        training: passed to a callable that takes it. Layers take it from the call context.
    """

    def __init__(self, events: Sequence[Event], t0: tf.Tensor, y0: Nest, args: Nest, training: bool | None) -> None:
        self.events = events
        self.args = args
        self.training = training
        for event in events:
            event.build(trees.align(t0, tf.nest.flatten(y0)[0]), y0, args)
        self._pure = [self._pure_function(event, t0, y0) for event in events]
        self._resets = [None if event.reset is None else FieldCall(event.reset, y0, "A reset") for event in events]

    @property
    def take_args(self) -> bool:
        """Whether any function or reset takes `args`."""
        given = [f for event in self.events for f in (event.function, event.reset) if f is not None]
        return any(call_arguments(f)[0] == 3 for f in given)

    def values(self, with_gradient: bool) -> list[Callable[[tf.Tensor, Nest], tf.Tensor]]:
        """For each event the function `g(t, y)`. Without a gradient, weights and `args` count as constants."""

        def function(pure: PureFunction) -> Callable[[tf.Tensor, Nest], tf.Tensor]:
            params, args = pure.params, self.args
            if not with_gradient:
                params, args = trees.stop_gradient(params), trees.constants(args)
            return lambda t, y: pure(params, pure.carried, t, y, args)[0]

        return [function(pure) for pure in self._pure]

    def land(
        self,
        vector_field: Callable[[tf.Tensor, Nest], Nest],
        t: tf.Tensor,
        y: Nest,
        index: tf.Tensor,
        ahead: tf.Tensor,
    ) -> tuple[tf.Tensor, Nest, tf.Tensor, tf.Tensor]:
        """Moves samples from next to an event exactly onto it, by Newton's method.

        The time `t` is a constant, and the time of the event is a differentiable function of the state at `t`, of the
        weights and of `args`. Two iterations give its first and second derivatives, and a step of the midpoint rule
        those of the state. The rate of change of an event function counts as a constant, which changes neither.

        Args:
            vector_field: `f(t, y)`.
            t: the times, `(batch,)`.
            y: the states there.
            index: the number of the event of every sample, and -1 for a sample that has none and does not move.
            ahead: the side of zero on which the function was before, times the direction of time, `(batch,)`.

        Returns:
            The time from `t` to the event, the state there, whether the state passes the surface of the event, and the
            rate of change of the event function.
        """
        functions = self.values(with_gradient=True)

        def own(t: tf.Tensor, y: Nest, dy: Nest) -> tuple[tf.Tensor, tf.Tensor]:
            """The value and the rate of change of the function of each sample's own event."""
            total, total_rate = tf.zeros_like(t), tf.zeros_like(t)
            for i, function in enumerate(functions):
                value, rate, _ = value_and_rate(function, t, y, dy)
                total, total_rate = tf.where(index == i, value, total), tf.where(index == i, rate, total_rate)
            return total, total_rate

        dy = vector_field(t, y)
        value, rate = own(t, y, dy)
        passes = (index < 0) | (rate * ahead < 0)

        def newton(value: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
            usable = (index >= 0) & passes & (rate != 0)
            rate = tf.stop_gradient(tf.where(usable, rate, tf.ones_like(rate)))
            return tf.where(usable, -value / rate, tf.zeros_like(value))

        def moved_by(dt: tf.Tensor) -> Nest:
            half = 0.5 * dt
            middle = trees.add(y, trees.scale(half, dy))
            return trees.add(y, trees.scale(dt, vector_field(t + half, middle)))

        dt = newton(value, rate)
        near = moved_by(dt)
        dt = dt + newton(*own(t + dt, near, vector_field(t + dt, near)))
        return dt, moved_by(dt), passes, tf.stop_gradient(rate)

    def reset(self, t: tf.Tensor, y: Nest, index: tf.Tensor) -> Nest:
        """The states after events. The other samples keep theirs."""
        for i, call in enumerate(self._resets):
            if call is not None:
                after = call(t, y, self.args, training=self._training_of(call.function))
                y = trees.where(index == i, like_state(after, y, call.function, "A reset", "new value"), y)
        return y

    def _pure_function(self, event: Event, t0: tf.Tensor, y0: Nest) -> PureFunction:
        call = FieldCall(event.function, y0, "An event function")

        def evaluate(t: tf.Tensor, y: Nest, args: Nest) -> tf.Tensor:
            with tf.name_scope("event"):
                value = call(t, y, args, training=self._training_of(event.function))
            return _one_per_sample(value, t, y, event.function)

        layer = event.function if isinstance(event.function, keras.Layer) else None
        variables = [] if layer is None else [*layer.trainable_variables, *layer.non_trainable_variables]
        arguments = trees.constants((t0, y0, self.args))
        pure = PureFunction(evaluate, *arguments, variables=variables)
        for variable, value in pure.updates:
            if not is_seed(variable):
                raise ValueError(
                    "An event function cannot update a state, because it is evaluated at every step: replace "
                    "BatchNormalization by LayerNormalization. "
                    f"Received: {event.function!r}, which updates {variable.path!r}"
                )
            variable.assign(value)
        return pure

    def _training_of(self, function: Any) -> bool | None:
        return None if isinstance(function, keras.Layer) else self.training


def _one_per_sample(value: Any, t: tf.Tensor, y: Nest, function: Any) -> tf.Tensor:
    """Checks the value of an event function and returns it as `(batch,)`, in the precision of the state."""
    if value is None:
        raise ValueError(
            "An event function must return one number for each sample: look for a `return` that is missing. "
            f"Received: None from {function!r}"
        )
    value = tf.convert_to_tensor(value)
    leaf = tf.nest.flatten(y)[0]
    if value.shape.rank is None or value.shape.rank == 0 or any(size != 1 for size in value.shape[1:]):
        raise ValueError(
            "An event function must return one number for each sample, of shape (batch,) or (batch, 1). If the time "
            "is part of it, remember that `t` has the rank of the state: take `y[:, :1]` with `t`, or `t[:, 0]` with "
            "`y[:, 0]`. For a single sample, give the state a batch axis of 1. "
            f"Received: shape={tuple(value.shape)} for a state of shape {tuple(leaf.shape)}, from {function!r}"
        )
    if not value.dtype.is_floating:
        raise TypeError(
            "An event function must return a floating-point number that changes its sign at the event, such as "
            "`y[:, 0] - level`, and not whether the event has happened. "
            f"Received: dtype={value.dtype.name}, from {function!r}"
        )
    return tf.ensure_shape(tf.cast(tf.reshape(value, [-1]), leaf.dtype), t.shape)
