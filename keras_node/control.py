"""Control signals: paths in continuous time through irregular observations with missing values.

In `keras.ops` throughout, so that a path may be laid through the symbolic inputs of a functional model too.
"""

import math
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_node.times import prepare_times

INTERPOLATIONS = ("linear", "hermite", "rectilinear")


class ControlPath(NamedTuple):
    """A piecewise polynomial path `X(t)`, a nest of tensors that travels into a vector field as its `args`.

    From `times[i]` to `times[i + 1]`

    `X(t) = sum over k of coefficients[i, k] * s^k`, `s = (t - times[i]) / (times[i + 1] - times[i])`

    Before the first knot and after the last it is constant. `keras_node.control_path` makes one from data. Write
    `ControlPath(*args)` where a field receives it: a functional model that was saved and loaded hands over a list.

    Attributes:
        times: the knots, `(batch, K)`. Where two are equal the path jumps, or stays if their step was masked.
        coefficients: of the pieces after the knots, `(batch, K, degree + 1, channels)`.
    """

    times: Any
    coefficients: Any

    def __call__(self, t):
        """The value at `t`, a scalar or `(batch, ..., 1)`, as a field gets it: `(batch, ..., channels)`."""
        coefficients, s, _ = self._piece(_points(t, self.times.dtype), ops.less_equal)
        return _like_time(t, polynomial(coefficients, s))

    def derivative(self, t):
        """The rate of change at `t`, in the shape of the value.

        At a knot it is that of the piece after it, at the last knot that of the piece before. A jump has none: that
        of a rectilinear path is zero. That of a linear path jumps from piece to piece, so that the gradient of an
        integral of it is right with respect to values, and not to times; `keras_node.NeuralCDE` has both.
        """
        points = _points(t, self.times.dtype)
        inside = (points >= self.times[:, :1, None]) & (points <= self.times[:, -1:, None])
        coefficients, s, length = self._piece(points, self._started)
        rate = ops.divide_no_nan(polynomial(differentiate(coefficients), s), length)
        return _like_time(t, ops.where(inside, rate, 0))

    def _started(self, times, points):
        return ops.where(points == times[..., -1:], times < points, times <= points)

    def _piece(self, points, started):
        """The piece at every point: its coefficients, the fraction `s` of it that has passed, and its length."""
        # Counting serves any batch under XLA, where a search would compare with every knot as well.
        number = ops.sum(ops.cast(started(self.times[:, None], points), "int32"), axis=-1)
        index = ops.maximum(number - 1, 0)
        start = ops.expand_dims(ops.take_along_axis(self.times, index, axis=1), -1)
        length = ops.expand_dims(ops.take_along_axis(increments(self.times), index, axis=1), -1)
        s = ops.maximum(ops.divide_no_nan(points - start, length), 0)
        coefficients = ops.take_along_axis(self.coefficients, index[..., None, None], axis=1)
        return coefficients, *(ops.cast(x, coefficients.dtype) for x in (s, length))


def control_path(times, values, mask=None, interpolation="hermite"):
    """Lays a path through observations: `X(times[i]) = values[i]`, and something sensible in between.

    - `"linear"`: straight from one observation to the next.
    - `"hermite"`: a cubic whose slope at an observation is that of the straight line from the one before. The path has
      no kinks, and up to an observation it depends on nothing later, if none is missing.
    - `"rectilinear"`: the last observation, until the next one comes. The path jumps, and depends on nothing later
      even where values are missing.

    A missing value is filled in before: for `"rectilinear"` by the channel's last one, and zero where there is none;
    else on the straight line between the channel's observations before and after it, or by the nearest where there is
    only one of them. A step at which nothing was observed is no knot, and its time has no effect.

    The path is differentiable in `values` and, if it has no jumps, in `times`. Knots are kinks of a linear path, and of
    the derivative of a cubic. If all samples have the same, `RungeKutta(step_at=...)` makes a solver step from one to
    the next; if not, adaptive steps find them, at the price of some rejected ones.

    Args:
        times: when observations were made, `(batch, T)`, or `(T,)` for all samples. They must not decrease. Times that
            the precision of `values` cannot tell apart stay in float64 and make a path for float64 `t`. A field sees
            `t` in the precision of its state: there, count them from a time that is near.
        values: the observations, a float tensor `(batch, T, channels)`. NaN is a missing value.
        mask: boolean, `(batch, T)` or `(batch, T, channels)`; false where there is no observation, whatever `values`
            and `times` hold there.
        interpolation: `"linear"`, `"hermite"` (default) or `"rectilinear"`.

    Returns:
        A `keras_node.ControlPath`. Where times decrease, it is NaN.

    Raises:
        ValueError: for inputs of another shape, and for an unknown `interpolation`.
        TypeError: for values that are not floating-point.

    Example:
    >>> path = keras_node.control_path([0.0, 1.0, 3.0], tf.constant([[[0.0], [1.0], [5.0]]]), interpolation="linear")
    >>> float(path(2.0)[0, 0]), float(path.derivative(2.0)[0, 0])
    (3.0, 2.0)

    A field that is driven by data:

    >>> driven = lambda t, y, args: keras_node.ControlPath(*args)(t) - y
    >>> layer = keras_node.ODELayer(driven, t1=3.0)
    >>> layer(tf.zeros((1, 1)), args=path).shape
    TensorShape([1, 1])

    Reference:

    - Kidger, Morrill, Foster & Lyons (2020), "Neural Controlled Differential Equations for Irregular Time Series".
    - Morrill, Kidger, Yang & Lyons (2021), "Neural Controlled Differential Equations for Online Prediction Tasks".
    """
    values = ops.convert_to_tensor(values)
    if not keras.backend.is_float_dtype(values.dtype):
        raise TypeError(f"Observations must be floating-point. Received: values.dtype={values.dtype}")
    times = prepare_times(times, values.dtype)
    if len(times.shape) == 1:
        times = times + ops.zeros_like(values[..., 0], dtype=times.dtype)
    knots, coefficients, ordered = pieces(times, ops.cast(values, times.dtype), mask, interpolation)
    coefficients = ops.cast(coefficients, values.dtype)
    if interpolation == "rectilinear":
        # To move a jump changes an integral in a way that no derivative along the path can see.
        knots = ops.stop_gradient(knots)
    return ControlPath(knots, ops.where(ordered[:, None, None, None], coefficients, float("nan")))


def pieces(times, values, mask, interpolation):
    """The knots, the pieces' coefficients, and whether a sample's times are finite and do not decrease, `(batch,)`."""
    if interpolation not in INTERPOLATIONS:
        names = ", ".join(repr(name) for name in INTERPOLATIONS)
        raise ValueError(f"`interpolation` must be one of {names}. Received: interpolation={interpolation!r}")
    mask = None if mask is None else ops.cast(mask, "bool")
    _check_shapes(times, values, mask)
    observed = ~ops.isnan(values)
    if mask is not None:
        observed &= ops.expand_dims(mask, -1) if len(mask.shape) == 2 else mask
    valid = ops.any(observed, axis=-1)

    # What is not there may hold anything, and the gradient of a masked NaN would still be NaN.
    values = ops.where(observed, values, 0)
    times = last_valid(ops.where(valid, times, 0), valid)
    gaps = times[:, 1:] - times[:, :-1]
    ordered = ops.all(ops.isfinite(times), axis=1) & ops.all(gaps >= 0, axis=1)
    times = ops.where(ordered[:, None], times, 0)

    if interpolation == "rectilinear":
        known = ops.cumsum(ops.cast(observed, "int32"), axis=1) > 0
        values = last_valid(ops.where(known, last_valid(values, observed), 0), ops.expand_dims(valid, -1))
        # Time passes first, and then the values change.
        times, values = ops.repeat(times, 2, axis=1)[:, 1:], ops.repeat(values, 2, axis=1)[:, :-1]
    else:
        values = _fill_linearly(ops.expand_dims(times, -1), values, observed)
    change = increments(values)
    if interpolation != "hermite":
        return times, ops.stack([values, change], axis=2), ordered
    length = ops.expand_dims(increments(times), -1)
    # Of the last piece before in which time passed; the first one is straight.
    slope = last_valid(ops.divide_no_nan(change, length), length > 0)
    start = length * ops.concatenate([slope[:, :1], slope[:, :-1]], axis=1)
    bend = change - start
    return times, ops.stack([values, start, 2 * bend, -bend], axis=2), ordered


def last_valid(values, valid):
    """At every step the value of the last valid step up to it, before the first that of the first.

    Args:
        values: `(batch, T, ...)`.
        valid: boolean, of a shape that broadcasts against `values` from the first axis on.
    """
    steps = ops.cumsum(ops.ones_like(valid, dtype="int32"), axis=1) - 1
    order = ops.sort(ops.where(valid, steps, steps[:, -1:]), axis=1)  # the valid steps come first
    rank = ops.maximum(ops.cumsum(ops.cast(valid, "int32"), axis=1) - 1, 0)
    return ops.take_along_axis(values, ops.take_along_axis(order, rank, axis=1), axis=1)


def increments(x):
    """From every step to the next, and zero at the last."""
    return ops.concatenate([x[:, 1:], x[:, -1:]], axis=1) - x


def polynomial(coefficients, s):
    """`sum over k of coefficients[..., k, :] * s^k`."""
    value = coefficients[..., -1, :]
    for k in reversed(range(coefficients.shape[-2] - 1)):
        value = coefficients[..., k, :] + s * value
    return value


def differentiate(coefficients):
    """The coefficients of a polynomial's derivative."""
    degree = coefficients.shape[-2] - 1
    return ops.stack([k * coefficients[..., k, :] for k in range(1, degree + 1)], axis=-2)


def _fill_linearly(times, values, observed):
    """Missing values on the straight line between those observed before and after."""
    times = times + ops.zeros_like(values)
    before, x_before = (last_valid(a, observed) for a in (times, values))
    after, x_after = (
        ops.flip(last_valid(ops.flip(a, axis=1), ops.flip(observed, axis=1)), axis=1) for a in (times, values)
    )
    return x_before + ops.divide_no_nan(times - before, after - before) * (x_after - x_before)


def _points(t, dtype):
    """Times `(batch, number, 1)` from a scalar, or from `(batch, ..., 1)`."""
    t = ops.convert_to_tensor(t, dtype=dtype)
    if len(t.shape) == 0:
        return ops.reshape(t, (1, 1, 1))
    if len(t.shape) == 1 or t.shape[-1] != 1:
        raise ValueError(f"`t` must be a scalar or (batch, ..., 1). Received: t.shape={tuple(t.shape)}")
    return ops.reshape(t, (-1, math.prod(t.shape[1:]), 1))


def _like_time(t, values):
    """Values `(batch, number, channels)` in the shape of `t`, with channels in place of its last axis."""
    shape = ops.shape(t)
    return ops.reshape(values, (-1, *shape[1:-1], values.shape[-1]))


def _check_shapes(times, values, mask):
    if len(values.shape) != 3:
        raise ValueError(f"Observations must be (batch, T, channels). Received: values.shape={tuple(values.shape)}")
    steps, entries = values.shape[:2], values.shape
    if not _fits(times.shape, steps):
        raise ValueError(
            "`times` must be (batch, T), one time for every step of the observations. "
            f"Received: times.shape={tuple(times.shape)} with values.shape={tuple(values.shape)}"
        )
    if mask is not None and not (_fits(mask.shape, steps) or _fits(mask.shape, entries)):
        raise ValueError(
            "`mask` must be (batch, T) or (batch, T, channels), as the observations are. "
            f"Received: mask.shape={tuple(mask.shape)} with values.shape={tuple(values.shape)}"
        )


def _fits(shape, expected):
    return len(shape) == len(expected) and all(None in (m, n) or m == n for m, n in zip(shape, expected, strict=True))
