"""Jumps of the state at times that are known before the solve, such as doses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_node.clock import reorder
from keras_node.times import prepare_times
from keras_node.trees import Nest


class Jumps(NamedTuple):
    """Jumps in the order in which a solve meets them.

    Attributes:
        ts: their times, `(D + 1, batch)`. Those outside the solve are at its end. The last row belongs to no jump, so
            that there is one to read after the last jump.
        amounts: what is added to the state, `(D + 1, batch, ...)`, zero for a jump outside the solve.
    """

    ts: tf.Tensor
    amounts: Nest

    @property
    def number(self) -> int | tf.Tensor:
        """The number of jumps, as a Python integer if it is known."""
        rows = self.ts.shape[0]
        return (tf.shape(self.ts)[0] if rows is None else rows) - 1


def prepare_jumps(jumps: Any, ts: tf.Tensor, y0: Nest) -> Jumps:
    """Checks `jumps=(times, amounts)` and sorts them.

    Args:
        jumps: times `(D,)` or `(D, batch)`, and amounts in the structure of the state, `(D, ...)` or `(D, batch, ...)`.
        ts: the times of the solve, `(T, batch)`.
        y0: the initial state, with a batch axis.
    """
    check_jumps(jumps)
    times = tf.cast(tf.convert_to_tensor(prepare_times(jumps[0], ts.dtype, axis=0)), ts.dtype)
    if times.shape.rank not in (1, 2):
        raise ValueError(
            f"The times of `jumps` must be of shape (D,) or (D, batch). Received: shape={tuple(times.shape)}"
        )
    first, last = ts[0], ts[-1]
    times = times if times.shape.rank == 2 else times[:, None] + tf.zeros_like(first)
    # The states at `ts` are those before a jump at the same time, so a jump at the last time changes nothing.
    inside = tf.where(last < first, (times <= first) & (times > last), (times >= first) & (times < last))
    times = tf.where(inside, times, last)
    order = tf.argsort(tf.where(last < first, -times, times), axis=0, stable=True)

    def leaf(amount: Any, y: tf.Tensor) -> tf.Tensor:
        amount = tf.cast(tf.convert_to_tensor(amount), y.dtype)
        if amount.shape.rank not in (y.shape.rank, y.shape.rank + 1):
            raise ValueError(
                "The amounts of `jumps` must have the shape of the state after the axis of the jumps: (D, ...) if all "
                "samples share them, or (D, batch, ...). "
                f"Received: amounts of shape {tuple(amount.shape)} for a state of shape {tuple(y.shape)}"
            )
        amount = amount if amount.shape.rank > y.shape.rank else amount[:, None]
        mask = tf.reshape(inside, tf.concat([tf.shape(inside), tf.ones([y.shape.rank - 1], tf.int32)], axis=0))
        nothing = tf.zeros_like(y)
        return tf.concat([reorder(tf.where(mask, amount, nothing), order), nothing[None]], axis=0)

    amounts = map_amounts(leaf, jumps[1], y0)
    return Jumps(tf.concat([reorder(times, order), last[None]], axis=0), amounts)


def check_jumps(jumps: Any) -> None:
    """Checks that `jumps` is a pair."""
    if not isinstance(jumps, list | tuple) or len(jumps) != 2:
        raise ValueError(
            "`jumps` must be a pair `(times, amounts)`: times of shape (D,) or (D, batch), and what to add to the "
            f"state at each of them. Received: jumps={jumps!r}"
        )


def map_amounts(function: Callable[[Any, tf.Tensor], tf.Tensor], amounts: Nest, y0: Nest) -> Nest:
    """Calls a function for every tensor of the state, with the amounts of jumps that belong to it."""
    try:
        keras.tree.map_structure_up_to(y0, lambda *_: None, amounts, y0)
        # For a state of one tensor, anything would count as its amounts.
        fits = isinstance(y0, dict) or not isinstance(amounts, dict)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"The amounts of `jumps` must have the structure of the state. Received: amounts={amounts!r}")
    return keras.tree.map_structure_up_to(y0, function, amounts, y0)
