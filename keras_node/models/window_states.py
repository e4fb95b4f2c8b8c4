"""The trained initial states of windows, for multiple shooting."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops


class WindowStates(keras.Layer):
    """One trained state for each window of each trajectory of the training data.

    The states are in units of the scale of the channels, so that an optimizer moves all channels alike.
    """

    built: bool

    def build(self, shape: tuple[int, int, int]) -> None:
        """Makes the states, `(N, windows, D)`."""
        self.states = self.add_weight(shape=shape, initializer="zeros", name="states")

    def take(self, index: Any, number_of_windows: int | tf.Tensor) -> tf.Tensor:
        """Returns the states of a batch, `(batch * number_of_windows, D)`. `index`: the number of each trajectory."""
        if index is None or not self.built:
            raise ValueError(
                'With `initial_states="trained"` the model needs to know which trajectory is which: pass arrays to '
                '`fit`, not a data set, or choose `initial_states="observed"`. Received: data without an `index`'
            )
        _, made_for, dim = self.states.shape
        # Where the number is a tensor, `begin_at` has checked it.
        if isinstance(number_of_windows, int) and made_for != number_of_windows:
            raise ValueError(self._other_data(f"trajectories with {number_of_windows} windows"))
        return ops.reshape(ops.take(self.states, index, axis=0), (-1, dim))

    def begin_at(self, observed: tf.Tensor, trajectories: int) -> None:
        """Makes the states, which begin at the observed ones, `(trajectories * windows, D)`, if there are none yet."""
        states = ops.reshape(observed, (trajectories, -1, observed.shape[-1]))
        if not self.built:
            self.build(tuple(states.shape))
            self.built = True
            self.states.assign(states)
        elif self.states.shape != states.shape:
            raise ValueError(self._other_data(f"{trajectories} trajectories with {states.shape[1]} windows"))

    def _other_data(self, received: str) -> str:
        trajectories, number_of_windows, _ = self.states.shape
        return (
            f"The model has trained initial states for {trajectories} trajectories with {number_of_windows} windows: "
            f"train it on the same ones, or make a new model. Received: {received}"
        )


def gaps(
    ends: tf.Tensor, starts: tf.Tensor, seen: tf.Tensor, number_of_windows: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the squared gap between each window's end and the next one's start, and 1 for those that count.

    Args:
        ends: the last states of the windows, `(batch * W, D)`.
        starts: their first states, `(batch * W, D)`.
        seen: boolean, `(batch * W,)`: whether anything was observed in a window. If not, the gap before it is left out.
        number_of_windows: the number `W` of windows in a trajectory.

    Returns:
        Two tensors `(batch, W - 1, D)`.
    """
    shape = (-1, number_of_windows, ends.shape[-1])
    squares = (ops.reshape(ends, shape)[:, :-1] - ops.reshape(starts, shape)[:, 1:]) ** 2
    counts = ops.reshape(ops.cast(seen, squares.dtype), (-1, number_of_windows))[:, 1:, None]
    return squares, ops.broadcast_to(counts, ops.shape(squares))
