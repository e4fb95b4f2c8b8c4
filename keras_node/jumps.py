"""Jumps of the state at times that are known before the solve, such as doses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_node import trees
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
    if times.shape.rank not in (1, 2) or not _fits(times.shape[1:], ts.shape[1:]):
        raise ValueError(
            "The times of `jumps` must be of shape (D,) if all samples share them, or (D, batch). "
            f"Received, with the axis of the jumps first: shape={tuple(times.shape)} for a batch of {ts.shape[1]}"
        )
    first, last, given = ts[0], ts[-1], times
    times = (times if times.shape.rank == 2 else times[:, None]) + tf.zeros_like(first)
    # The states at `ts` are those before a jump at the same time, so a jump at the last time changes nothing.
    inside = tf.where(last < first, (times <= first) & (times > last), (times >= first) & (times < last))
    times = tf.where(inside, times, last)
    order = tf.argsort(tf.where(last < first, -times, times), axis=0, stable=True)

    def leaf(amount: Any, y: tf.Tensor) -> tf.Tensor:
        amount = tf.cast(tf.convert_to_tensor(amount), y.dtype)
        is_shared = amount.shape.rank == y.shape.rank
        fits = amount.shape[:1].is_compatible_with(given.shape[:1]) and (
            amount.shape[1:].is_compatible_with(y.shape[1:]) if is_shared else _fits(amount.shape[1:], y.shape)
        )
        if not fits:
            raise ValueError(
                "The amounts of `jumps` must have one entry for each time, and then the shape of the state: (D, ...) "
                "if all samples share them, or (D, batch, ...). "
                "Received, with the axis of the jumps first: "
                f"amounts of shape {tuple(amount.shape)} for times of shape {tuple(given.shape)} and a "
                f"state of shape {tuple(y.shape)}"
            )
        if None in (amount.shape[0], given.shape[0]):
            numbers = tf.shape(amount)[0], tf.shape(given)[0]
            with tf.control_dependencies(
                [tf.debugging.assert_equal(*numbers, "`jumps` need one amount for each time")]
            ):
                amount = tf.identity(amount)
        amount = amount[:, None] if is_shared else amount
        mask = trees.expand(inside, inside.shape.rank + y.shape.rank - 1)
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


def _fits(shape: tf.TensorShape, expected: tf.TensorShape) -> bool:
    """Whether a shape that begins with the batch is the expected one. A batch of 1 serves for all samples."""
    return shape.rank == 0 or shape.is_compatible_with(expected) or shape.is_compatible_with([1, *expected[1:]])
