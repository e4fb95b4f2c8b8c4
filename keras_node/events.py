"""What a user says about events, and what a solve says about them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_node.signatures import FieldCall
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class Event:
    """Something that happens when a function of time and state becomes zero.

    `g(t*, y(t*)) = 0`

    Every sample of a batch has its own event time `t*`. A solve looks for a change of the sign of `g` between the ends
    of its steps. So a function that changes its sign twice within one step goes unnoticed: limit the steps, for example
    by `RungeKutta(step_size=...)`, if that can happen. A zero at the start of the solve is not an event.

    You can differentiate event times, and the states at and after an event, with respect to everything on which the
    solution depends, and to the weights of `function` and `reset` (neural event functions). With `phi` for all of
    these,

    `dt*/dphi = -(dg/dphi + dg/dy dy/dphi) / (dg/dt + dg/dy f)`

    Args:
        function: the function `g`, a Keras layer or a callable. It takes `(y)`, `(t, y)` or `(t, y, args)` as a vector
            field does, and returns one number for each sample, `(batch,)` or `(batch, 1)`. `t` has the shape
            `(batch, 1, ..., 1)` with the rank of `y`.
        direction: `1` if only a function that becomes positive is an event, `-1` if only one that becomes negative,
            both in the direction in which the solve goes. Defaults to `0`, for both.
        terminal: whether the event ends the solve of its sample. Defaults to `None`: it does unless there is a `reset`.
            With `False` and without a `reset`, the solve notes the event and goes on.
        reset: the state after the event as a function of the state before it, a Keras layer or a callable with the
            arguments of `function`. The solve goes on from there. Defaults to `None`.
        name: what the event is called where it is printed. Defaults to `None`, for the name of `function`.

    Raises:
        ValueError: for a `direction` other than -1, 0 and 1, and for a terminal event with a `reset`.
        TypeError: for a `function` or `reset` that cannot be called.

    Example:
        >>> ground = keras_node.Event(lambda t, y: y[:, 0], direction=-1)
        >>> fall = lambda t, y: tf.stack([y[:, 1], -9.8 + 0 * y[:, 1]], axis=1)
        >>> y0 = tf.constant([[4.9, 0.0], [19.6, 0.0]])  # height and velocity of two balls
        >>> solution = keras_node.odeint(fall, y0, [0.0, 5.0], event=ground)
        >>> [round(float(t), 3) for t in solution.events.ts[0]]
        [1.0, 2.0]

    Reference:

        - Chen, Amos & Nickel (2021), "Learning Neural Event Functions for Ordinary Differential Equations",
          arXiv:2011.03902.
        - Hiskens & Pai (2000), "Trajectory Sensitivity Analysis of Hybrid Systems", IEEE Trans. Circuits Syst. I 47(2),
          for the derivative of a reset (the saltation matrix).
    """

    def __init__(
        self,
        function: keras.Layer | Callable[..., tf.Tensor],
        direction: int = 0,
        terminal: bool | None = None,
        reset: keras.Layer | Callable[..., Nest] | None = None,
        name: str | None = None,
    ) -> None:
        FieldCall(function, role="An event function")
        if reset is not None:
            FieldCall(reset, role="A reset")
        if direction not in (-1, 0, 1):
            raise ValueError(f"`direction` must be -1, 0 or 1. Received: direction={direction!r}")
        if terminal and reset is not None:
            raise ValueError(
                "A terminal event ends the solve, so a `reset` has no effect. Leave out one of them. "
                f"Received: terminal={terminal!r}, reset={reset!r}"
            )
        self.function = function
        self.direction = int(direction)
        self.terminal = reset is None if terminal is None else bool(terminal)
        self.reset = reset
        self.name = name or getattr(function, "name", None) or getattr(function, "__name__", "event")

    @property
    def layers(self) -> list[keras.Layer]:
        """The Keras layers among `function` and `reset`."""
        return [f for f in (self.function, self.reset) if isinstance(f, keras.Layer)]

    def build(self, t: Any, y: Nest, args: Nest = None) -> None:
        """Builds these layers for arguments of these shapes, as far as they are known. `t` has the rank of `y`."""
        for layer in self.layers:
            call = FieldCall(layer, y)
            if not layer.built and (args is not None or call.num_arguments < 3):
                call.build(t, y, args)

    def get_config(self) -> dict[str, Any]:
        return {
            "function": keras.saving.serialize_keras_object(self.function),
            "direction": self.direction,
            "terminal": self.terminal,
            "reset": keras.saving.serialize_keras_object(self.reset),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Event":
        functions = {k: keras.saving.deserialize_keras_object(config[k]) for k in ("function", "reset")}
        return cls(**{**config, **functions})

    def __repr__(self) -> str:
        return f"Event({self.name!r}, direction={self.direction}, terminal={self.terminal})"


class EventHistory(NamedTuple):
    """The events of a solve. There is one row for each possible event of a sample: one if all events are terminal.

    Attributes:
        ts: the times of the events, `(M, batch)`, in the order in which they happened. NaN where there was none.
        index: which event of the list it was, `(M, batch)` int32, and -1 where there was none.
        ys: the states before the events, in the structure of the state, `(M, batch, ...)`. NaN where there was none.
        count: the number of events of every sample, `(batch,)` int32.
    """

    ts: tf.Tensor
    index: tf.Tensor
    ys: Nest
    count: tf.Tensor


def as_events(event: Event | Sequence[Event] | None) -> list[Event]:
    """Returns one or several events as a list.

    Raises:
        TypeError: for anything else.
    """
    events = [] if event is None else [event] if isinstance(event, Event) else event
    if not isinstance(events, list | tuple) or not all(isinstance(e, Event) for e in events):
        raise TypeError(
            "`event` must be a `keras_node.Event` or a list of them, such as `keras_node.Event(lambda t, y: y[:, 0])`. "
            f"Received: event={event!r} (of type {type(event).__name__})"
        )
    return list(events)
