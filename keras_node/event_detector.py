"""Looks for events during a solve: places where a function of time and state changes its sign.

The functions are evaluated at the ends of accepted steps. If one of them has changed its sign, the sample does not take
this step. The dense output tells where the event is, and the next step of the sample ends there: it lands on the event.
Then the sample stands still.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.interpolation import interpolate
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.step import Step, with_dense_stages
from keras_node.step_size import Norm, rms_norm
from keras_node.trees import Nest
from keras_node.vjp import vjp

# The number of rounds that look for an event inside a step. Each round halves the interval or does better.
_ROUNDS = 10
# So many units in the last place of a time count as no time at all.
_ULPS = 16
# Events are at the same time if the readings of the clock at them are only so many of its units apart.
_SAME_TIME = 4


class Detected(NamedTuple):
    """What is known about the events of every sample.

    Attributes:
        sides: on which side of zero each function is, `(E, batch)`: 1, -1, or 0 if that is not known yet.
        values: the values of the functions at the last reading, `(E, batch)`.
        landing: whether the next step of a sample ends at an event, `(batch,)`.
        landed: whether it has ended there.
        target: the reading of the clock at this event.
        index: the number of this event, and -1 if there is none.
        time: the time at which a sample has landed, as a function of the first and the last time.
        stuck: whether a sample starts on an event and does not move away from it.
    """

    sides: tf.Tensor
    values: tf.Tensor
    landing: tf.Tensor
    landed: tf.Tensor
    target: tf.Tensor
    index: tf.Tensor
    time: tf.Tensor
    stuck: tf.Tensor


class EventDetector:
    """Watches a solve with per-sample steps.

    Args:
        functions: for each event a function `g(t, y)` that returns `(batch,)`, with `t` of shape `(batch,)`.
        directions: for each event 1 if only a rising function is an event, -1 if only a falling one, 0 for both.
        resets: for each event whether it has a reset.
        origin: the first time of every sample, `(batch,)`, in a precision that tells times apart.
        span: the time from the first to the last time of the whole solve, negative backward in time, `(batch,)`.
        joint: whether samples share the norm of the error.
        sides: the sides on which the functions were before the solve, `(E, batch)`.
        fired: the number of the event at which a sample starts, `(batch,)`, and -1 if there is none.
        fired_rate: the rate of change of its function when it fired, `(batch,)`.
    """

    def __init__(
        self,
        functions: Sequence[Callable[[tf.Tensor, Nest], tf.Tensor]],
        directions: Sequence[int],
        resets: Sequence[bool],
        origin: tf.Tensor,
        span: tf.Tensor,
        joint: bool,
        sides: tf.Tensor,
        fired: tf.Tensor,
        fired_rate: tf.Tensor,
    ) -> None:
        self.functions = functions
        self.directions = directions
        self.resets = resets
        self.origin = origin
        self.span = span
        self.joint = joint
        self.sides = sides
        self.fired = fired
        self.fired_rate = fired_rate

    def start(self, t: tf.Tensor, y: Nest, dy: Nest) -> Detected:
        """Finds out on which side of zero every function starts, at time `t` in state `y` with the rate `dy`."""
        found = [value_and_rate(g, t, y, dy) for g in self.functions]
        value, rate, by_time = (tf.stop_gradient(tf.stack(x)) for x in zip(*found, strict=True))
        rate = rate * tf.sign(self.span)
        here = tf.range(len(self.functions))[:, None] == self.fired
        eps = _eps(value)
        # By so much, rounding may change the value: that of times, and of the time that the function sees.
        rounding = self._resolution(t, tf.abs(self.span)) * tf.abs(rate) + _ULPS * eps * tf.abs(t * by_time)
        # A reset leaves the state on the surface of its event, up to rounding, or moves it clearly away from it.
        fastest = tf.maximum(tf.abs(rate), tf.abs(self.fired_rate))
        near = eps**0.5 * tf.abs(self.span) * fastest + rounding
        on_it = tf.abs(value) <= tf.where(here, near, rounding)
        # An event that happens at the same time as the one that has fired is still to come.
        waits = on_it & ~here & (self.sides != 0)
        sides = tf.where(on_it, tf.where(waits, self.sides, tf.sign(rate)), tf.sign(value))
        # An event without a reset leaves the function on the other side.
        is_reset = tf.constant(self.resets)[:, None]
        sides = tf.where(here & ~is_reset, -self.sides, sides)
        nothing = tf.zeros_like(t)
        none = tf.zeros_like(nothing, tf.bool)
        return Detected(
            sides=sides,
            values=tf.where(on_it, tf.zeros_like(value), value),
            landing=none,
            landed=none,
            target=nothing,
            index=tf.fill(tf.shape(t), -1),
            time=t,
            # After a reset that stops the motion, what is left of it may be a rounding error.
            stuck=tf.reduce_any(here & is_reset & on_it & (tf.abs(rate) <= eps**0.5 * tf.abs(self.fired_rate)), axis=0),
        )

    def time(self, reading: tf.Tensor) -> tf.Tensor:
        """The time at a reading of the clock, in the precision of times."""
        sign = tf.cast(tf.sign(self.span), self.origin.dtype)
        return self.origin + sign * tf.cast(reading, self.origin.dtype)

    def _resolution(self, t: tf.Tensor, elapsed: tf.Tensor) -> tf.Tensor:
        """A few rounding errors of the time `t`, at which so much time has passed."""
        return _ULPS * (_eps(self.origin) * tf.abs(t) + _eps(t) * elapsed)

    def norm(self, active: tf.Tensor) -> Norm:
        """The norm of an error, one value for each sample. In a joint solve it is the mean over the active samples."""

        def norm(x: Nest) -> tf.Tensor:
            own = rms_norm(x, per_sample=True)
            if not self.joint:
                return own
            number = tf.reduce_sum(tf.cast(active, own.dtype))
            squares = tf.where(active, tf.square(own), tf.zeros_like(own))
            mean = tf.math.divide_no_nan(tf.reduce_sum(squares), number)
            return tf.sqrt(mean) + tf.zeros_like(own)

        return norm

    def update(
        self,
        detected: Detected,
        tableau: ButcherTableau,
        step: Step,
        start: tf.Tensor,
        end: tf.Tensor,
        moved: tf.Tensor,
        last: tf.Tensor,
    ) -> Detected:
        """Looks for events in a step.

        Args:
            detected: what was known before the step.
            tableau: the method.
            step: the step.
            start: the reading of the clock at its start, `(batch,)`.
            end: the reading at its end.
            moved: whether a sample takes the step.
            last: whether the solve ends with it.

        Returns:
            What is known now. A sample that is `landing` now, and was not before, must not take the step.
        """
        sides, before = detected.sides, detected.values
        values = self._values(step.t + step.dt, step.y1)
        directions = tf.constant(self.directions, sides.dtype)[:, None]
        counts = (sides != 0) & ((directions == 0) | (directions == -sides))
        resolution = self._resolution(step.t + step.dt, end)
        # At the last time an event may be missed by the rounding error of a time.
        part = tf.abs(tf.math.divide_no_nan(resolution, step.dt))
        nearly = tf.where(last, tf.minimum(part, 0.5) * tf.abs(values - before), 0)
        # A function that starts at zero, as after its event, has no sign within the rounding error of a time.
        has_sign = (before != 0) | (end > self._resolution(step.t + step.dt, tf.abs(self.span)))
        crossed = moved & ~detected.landing & counts & has_sign & (sides * values <= nearly)
        found = tf.reduce_any(crossed, axis=0)
        step = with_dense_stages(tableau, step, tf.reduce_any(found))
        fraction = tf.where(crossed, self._fractions(tableau, step, crossed, sides, before, values), 2.0)
        first = tf.stop_gradient(tf.reduce_min(fraction, axis=0))
        # Of several events at the same time, the first one counts. Rounding may tell the readings of their times apart.
        rounding = tf.math.divide_no_nan(_SAME_TIME * _eps(end) * end, end - start)
        at_once = crossed & (fraction <= first + rounding)
        index = tf.argmax(tf.cast(at_once, tf.int32), axis=0, output_type=tf.int32)
        # This is the reading that the clock of the gradient will have at the time of the event.
        elapsed = self.time(start + first * (end - start)) - self.origin
        target = tf.cast(tf.abs(elapsed), start.dtype)
        arrives = moved & detected.landing
        known = moved & ~found & ~arrives & has_sign
        return detected._replace(
            sides=tf.where(known & (values != 0), tf.sign(values), sides),
            values=tf.where(known, values, before),
            landing=found,
            landed=detected.landed | arrives,
            target=tf.where(found, tf.minimum(target, end), detected.target),
            time=tf.where(arrives, step.t + step.dt, detected.time),
            index=tf.where(found, index, detected.index),
        )

    def _values(self, t: tf.Tensor, y: Nest) -> tf.Tensor:
        return tf.stop_gradient(tf.stack([g(t, y) for g in self.functions]))

    def _fractions(
        self,
        tableau: ButcherTableau,
        step: Step,
        crossed: tf.Tensor,
        sides: tf.Tensor,
        before: tf.Tensor,
        after: tf.Tensor,
    ) -> tf.Tensor:
        """The part of the step, from 0 to 1, that has passed at each event: `(E, batch)`.

        Reference: Ridders (1979), "A new algorithm for computing a single root of a real continuous function", IEEE
        Trans. Circuits Syst. 26(11).
        """

        def values_at(fractions: tf.Tensor) -> tf.Tensor:
            values = []
            for g, fraction in zip(self.functions, tf.unstack(fractions, len(self.functions)), strict=True):
                values.append(g(step.t + fraction * step.dt, interpolate(tableau, step, fraction)))
            return tf.stack(values)

        def narrowed(fraction: tf.Tensor, value: tf.Tensor, bracket: tuple) -> tuple:
            low, high, low_value, high_value = bracket
            before = sides * value > 0
            rises, falls = before & (fraction >= low), ~before & (fraction <= high)
            low, low_value = tf.where(rises, fraction, low), tf.where(rises, value, low_value)
            high, high_value = tf.where(falls, fraction, high), tf.where(falls, value, high_value)
            return low, high, low_value, high_value

        def body(i: tf.Tensor, bracket: tuple) -> tuple:
            low, high, low_value, high_value = bracket
            middle = 0.5 * (low + high)
            value = values_at(middle)
            size = tf.maximum(tf.abs(value), tf.maximum(tf.abs(low_value), tf.abs(high_value)))
            a, b, c = (tf.math.divide_no_nan(v, size) for v in (low_value, value, high_value))
            root = tf.sqrt(tf.maximum(b * b - a * c, 0))
            further = middle + (middle - low) * tf.math.divide_no_nan(sides * b, root)
            bracket = narrowed(middle, value, bracket)
            return i + 1, narrowed(further, values_at(further), bracket)

        zero = tf.zeros_like(after)
        high_value = -sides * tf.maximum(tf.abs(after), 1e-30)
        # At the start of a solve, a function may be zero. It has its sign only after that.
        low_value = tf.where(sides * before > 0, before, -high_value)
        _, (low, high, low_value, high_value) = tf.while_loop(
            lambda i, _: (i < _ROUNDS) & tf.reduce_any(crossed),
            body,
            (0, (zero, zero + 1, low_value, high_value)),
            maximum_iterations=_ROUNDS,
        )
        return tf.where(tf.abs(low_value) < tf.abs(high_value), low, high)


def value_and_rate(
    function: Callable[[tf.Tensor, Nest], tf.Tensor], t: tf.Tensor, y: Nest, dy: Nest
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The value of an event function, its derivative `dg/dt + dg/dy f` along the solution, and `dg/dt`: `(batch,)`."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        t, y = tf.nest.map_structure(tf.identity, (t, y))
        tape.watch(tf.nest.flatten((t, y)))
        value = function(t, y)
    by_t, by_y = vjp(tape, value, (t, y), tf.ones_like(value))
    products = tf.nest.map_structure(tf.multiply, by_y, dy)
    by_state = [tf.reduce_sum(p, list(range(1, p.shape.rank))) for p in tf.nest.flatten(products)]
    return value, by_t + trees.total(by_state), by_t


def _eps(x: tf.Tensor) -> float:
    """The distance from 1 to the next number in the precision of `x`."""
    return float(np.finfo(x.dtype.as_numpy_dtype).eps)
