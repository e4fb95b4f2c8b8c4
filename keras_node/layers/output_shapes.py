"""The shapes of what an `ODELayer` returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from keras_node.layers.call_times import check_times
from keras_node.trees import Nest


class OutputShapes(NamedTuple):
    """The shapes of states and events, from those of inputs.

    Attributes:
        augment_dims: the number of extra dimensions.
        num_events: the largest number of events.
    """

    augment_dims: int
    num_events: int

    def state(self, shape: tuple) -> tuple:
        """The shape of the state for an input of this shape."""
        if len(shape) < 2 and self.augment_dims:
            raise ValueError(
                "With `augment_dims` the input needs an axis of features after that of the batch. "
                f"Received: inputs of shape {tuple(shape)}"
            )
        return (*shape[:-1], None if shape[-1] is None else shape[-1] + self.augment_dims)

    def output(self, shape: tuple, ts_shape: tuple | None) -> tuple:
        """The shape of the output for an input and times of these shapes."""
        shape = self.state(shape)
        if ts_shape is None:
            return shape
        check_times(ts_shape)
        return (shape[0], ts_shape[-1], *shape[1:])

    def events(self, shapes: Nest) -> tuple[Nest, ...]:
        """The shapes of the outputs that describe events, for a nest of inputs of these shapes."""
        states = map_shapes(lambda shape: (shape[0], self.num_events, *self.state(shape)[1:]), shapes)
        leaves: list[tuple] = []
        map_shapes(leaves.append, shapes)
        batch = leaves[0][0]
        return (batch, self.num_events), (batch, self.num_events), states, (batch,)


def specs(shapes: Nest, dtype: str) -> Nest:
    """Tensor specs of these shapes."""
    return map_shapes(lambda shape: keras.KerasTensor(shape, dtype=dtype), shapes)


def map_shapes(function: Callable[[tuple], Any], shapes: Nest) -> Nest:
    """Applies a function to every shape in a nest. A shape is a tuple or a list of dimensions."""
    if isinstance(shapes, dict):
        return {key: map_shapes(function, shape) for key, shape in shapes.items()}
    if all(d is None or isinstance(d, int) for d in shapes):
        return function(tuple(shapes))
    return type(shapes)(map_shapes(function, shape) for shape in shapes)
