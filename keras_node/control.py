"""Control signals: paths in continuous time through irregular observations with missing values.

The code here uses `keras.ops` and one operation of its own, so that you can build a path from the symbolic inputs of a
functional model too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops

from keras_node.autograph import without_autograph
from keras_node.times import prepare_times

INTERPOLATIONS = ("linear", "hermite", "rectilinear")


class ControlPath(NamedTuple):
    """A piecewise polynomial path `X(t)`, a nest of tensors that you can pass to a vector field as its `args`.

    `X(t) = sum over k of coefficients[i, k] * s^k`

    `s = (t - times[i]) / (times[i + 1] - times[i])`

    This holds from `times[i]` to `times[i + 1]`. Before the first knot and after the last the path is constant.
    `keras_node.control_path` makes a path from data; call it, `path(t)`, for its value. Write `ControlPath(*args)` in a
    field that receives a path, because a functional model that was saved and loaded passes a list instead.

    Attributes:
        times: the knots, `(batch, K)`. Between two equal knots the path jumps, or stays if their step was masked.
        coefficients: the coefficients of the pieces after the knots, `(batch, K, degree + 1, channels)`.
    """

    times: Any
    coefficients: Any

    @without_autograph
    def __call__(self, t: Any) -> tf.Tensor:
        """Returns the value of the path.

        Args:
            t: the time, a scalar or `(batch, ..., 1)`, as a vector field gets it.

        Returns:
            The values, `(batch, channels)` for a scalar, or `(batch, ..., channels)`.

        Raises:
            ValueError: if `t` has another shape.
        """
        coefficients, s, _ = self._piece(_points(t, self.times.dtype), ops.less_equal)
        return _like_time(t, polynomial(coefficients, s))

    @without_autograph
    def derivative(self, t: Any) -> tf.Tensor:
        """Returns the rate of change of the path.

        At a knot this is the rate of the piece after it, and at the last knot the rate of the piece before it. Jumps do
        not count, so the rate of a rectilinear path is zero. The rate of a linear path jumps from piece to piece. So if
        you integrate it, the gradient with respect to values is right, but the gradient with respect to times is not.
        `keras_node.NeuralCDE` computes both correctly.

        Args:
            t: the time, a scalar or `(batch, ..., 1)`, as a vector field gets it.

        Returns:
            The rates, in the shape of the value.
        """
        points = _points(t, self.times.dtype)
        inside = (points >= self.times[:, :1, None]) & (points <= self.times[:, -1:, None])
        coefficients, s, length = self._piece(points, self._started)
        rate = ops.divide_no_nan(polynomial(differentiate(coefficients), s), length)
        return _like_time(t, ops.where(inside, rate, 0))

    def _started(self, times: tf.Tensor, points: tf.Tensor) -> tf.Tensor:
        return ops.where(ops.equal(points, times[..., -1:]), ops.less(times, points), ops.less_equal(times, points))

    def _piece(self, points: tf.Tensor, started: Callable) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns, for every point, the coefficients of its piece, the fraction `s` that has passed, and the length."""
        # Counting works for any batch under XLA, where a search would compare with every knot as well.
        number = ops.sum(ops.cast(started(self.times[:, None], points), "int32"), axis=-1)
        index = ops.maximum(number - 1, 0)
        # A sum, because a symbolic shape may not be known.
        last = ops.sum(ops.ones_like(self.times, dtype="int32"), axis=1, keepdims=True) - 1
        stop = take_steps(self.times, ops.minimum(index + 1, last))
        start, coefficients = take_steps(self.times, index), take_steps(self.coefficients, index)
        start, length = ops.expand_dims(start, -1), ops.expand_dims(stop - start, -1)
        s = ops.maximum(ops.divide_no_nan(points - start, length), 0)
        return coefficients, *(ops.cast(x, coefficients.dtype) for x in (s, length))


@tf.autograph.experimental.do_not_convert
def control_path(times: Any, values: Any, mask: Any = None, interpolation: str = "hermite") -> ControlPath:
    """Makes a path in continuous time out of observations.

    `X(times[i]) = values[i]`

    In between, the path depends on `interpolation`:

    - `"linear"`: a straight line from each observation to the next.
    - `"hermite"`: a cubic. Its slope at an observation is that of the straight line from the observation before it. The
      path has no kinks. If no value is missing, the path up to an observation does not depend on later ones.
    - `"rectilinear"`: the last observation, until the next one comes. The path jumps, and depends on nothing later even
      if values are missing.

    Missing values are filled in first. With `"rectilinear"`, each takes the last observed value of its channel, or zero
    if there is none yet. With the others, it lies on the straight line between the observations of its channel before
    and after it; if one of these does not exist, it takes the value of the other. A step at which nothing was observed
    is not a knot, and its time has no effect.

    The path is differentiable in `values` and, if it has no jumps, in `times`. A linear path has kinks at its knots,
    and so has the derivative of a cubic. If all samples have the same knots, pass these to `RungeKutta(step_at=...)`,
    and the solver steps from one to the next. If not, adaptive steps find the knots, at the price of some rejected
    steps.

    Args:
        times: times of the observations, `(batch, T)`, or `(T,)` for all samples, in the unit of the times of the
            solve. They must not decrease. Numbers that would be equal in the precision of `values`, or that are much
            farther from zero than from each other, stay in float64, and the path then takes a float64 `t`. But a field
            sees `t` in the precision of its state; for a field, count such times from an origin close to them.
        values: the observations, a float tensor `(batch, T, channels)`. A NaN is a missing value.
        mask: boolean, `(batch, T)` or `(batch, T, channels)`; false where there is no observation. The values there,
            and the times of steps without any observation, have no effect. Defaults to `None`.
        interpolation: `"linear"`, `"hermite"` (default) or `"rectilinear"`.

    Returns:
        A `keras_node.ControlPath`. For a sample whose times decrease, it is NaN.

    Raises:
        ValueError: for inputs of another shape, and for an unknown `interpolation`.
        TypeError: for values that are not floating-point.

    Example:
        >>> values = tf.constant([[[0.0], [1.0], [5.0]]])
        >>> path = keras_node.control_path([0.0, 1.0, 3.0], values, interpolation="linear")
        >>> float(path(2.0)[0, 0]), float(path.derivative(2.0)[0, 0])
        (3.0, 2.0)

        A field that is driven by data:

        >>> driven = lambda t, y, args: keras_node.ControlPath(*args)(t) - y
        >>> layer = keras_node.ODELayer(driven, t1=3.0)
        >>> layer(tf.zeros((1, 1)), args=path).shape
        TensorShape([1, 1])

    Reference:

        - Kidger, Morrill, Foster & Lyons (2020), "Neural Controlled Differential Equations for Irregular Time Series",
          arXiv:2005.08926.
        - Morrill, Kidger, Yang & Lyons (2021), "Neural Controlled Differential Equations for Online Prediction Tasks",
          arXiv:2106.11028: the choice of the interpolation.
    """
    values = ops.convert_to_tensor(values)
    if not keras.backend.is_float_dtype(values.dtype):
        raise TypeError(f"Observations must be floating-point; cast them first. Received: values.dtype={values.dtype}")
    times = prepare_times(times, values.dtype)
    if len(times.shape) == 1:
        times = times + ops.zeros_like(values[..., 0], dtype=times.dtype)
    knots, coefficients, ordered = pieces(times, ops.cast(values, times.dtype), mask, interpolation)
    coefficients = ops.cast(coefficients, values.dtype)
    if interpolation == "rectilinear":
        # Moving a jump changes an integral, but no derivative along the path contains this change.
        knots = ops.stop_gradient(knots)
    return ControlPath(knots, ops.where(ordered[:, None, None, None], coefficients, float("nan")))


def pieces(
    times: tf.Tensor, values: tf.Tensor, mask: Any, interpolation: str
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the knots, the coefficients of the pieces, and whether the times of each sample are in order."""
    if interpolation not in INTERPOLATIONS:
        names = ", ".join(repr(name) for name in INTERPOLATIONS)
        raise ValueError(f"`interpolation` must be one of {names}. Received: interpolation={interpolation!r}")
    _check_shapes(times, values, mask)
    observed = is_observed(values, mask)
    valid = ops.any(observed, axis=-1)

    # Missing values may hold anything, and the gradient of a masked NaN would still be NaN.
    values = ops.where(observed, values, 0)
    times = last_valid(ops.where(valid, times, 0), valid)
    gaps = times[:, 1:] - times[:, :-1]
    ordered = ops.all(ops.isfinite(times), axis=1) & ops.all(gaps >= 0, axis=1)
    times = ops.where(ordered[:, None], times, 0)

    if interpolation == "rectilinear":
        known = ops.cumsum(ops.cast(observed, "int32"), axis=1) > 0
        values = last_valid(ops.where(known, last_valid(values, observed), 0), valid)
        # Each step becomes two knots: the time passes first, and then the values change.
        times, values = ops.repeat(times, 2, axis=1)[:, 1:], ops.repeat(values, 2, axis=1)[:, :-1]
    else:
        values = fill_linearly(ops.expand_dims(times, -1), values, observed)
    change = increments(values)
    if interpolation != "hermite":
        return times, ops.stack([values, change], axis=2), ordered
    length = ops.expand_dims(increments(times), -1)
    # The slope at a knot is that of the last piece before it in which time passed. The first piece is straight.
    slope = last_valid(ops.divide_no_nan(change, length), length[..., 0] > 0)
    start = length * ops.concatenate([slope[:, :1], slope[:, :-1]], axis=1)
    bend = change - start
    return times, ops.stack([values, start, 2 * bend, -bend], axis=2), ordered


def is_observed(values: tf.Tensor, mask: Any) -> tf.Tensor:
    """Returns which of the values were observed, in their shape."""
    observed = ~ops.isnan(values)
    if mask is None:
        return observed
    mask = ops.cast(mask, "bool")
    return observed & (ops.expand_dims(mask, -1) if len(mask.shape) == 2 else mask)


def running_maximum(x: tf.Tensor) -> tf.Tensor:
    """Returns the largest value up to every step, on the last axis."""
    steps = x.shape[-1]
    for power in range(31 if steps is None else (steps - 1).bit_length()):
        shift = 2**power
        x = ops.concatenate([x[..., :shift], ops.maximum(x[..., shift:], x[..., :-shift])], axis=-1)
    return x


def last_valid(values: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Returns, at every step, the value of the last valid step up to it.

    Steps before the first valid step get the value of the first valid step.

    Args:
        values: `(batch, T)` or `(batch, T, channels)`.
        valid: boolean, of the shape of `values`, or `(batch, T)`.
    """
    order, number = _valid_steps(valid)
    return take_steps(values, take_steps(order, ops.maximum(number - 1, 0)))


def _valid_steps(valid: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the indices of the valid steps, one after the other, and how many there are up to every step.

    The last step follows, so that there are as many indices as steps.
    """
    steps = ops.cumsum(ops.ones_like(valid, dtype="int32"), axis=1) - 1
    order = ops.sort(ops.where(valid, steps, steps[:, -1:]), axis=1)
    return order, ops.cumsum(ops.cast(valid, "int32"), axis=1)


def take_steps(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Returns `x[b, index[b, i]]` for `x` of shape `(batch, T, ...)`, or `(1, T, ...)`, and an index `(batch, N)`.

    If there is an index for every channel, `(batch, N, channels)`, these are the values `x[b, index[b, i, c], c]`.
    """
    symbolic = isinstance(x, keras.KerasTensor) or isinstance(index, keras.KerasTensor)
    return TakeSteps()(x, index) if symbolic else _take_steps(x, index)


def _take_steps(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    # `ops.take_along_axis` and its gradient make several times as many operations, each of which takes time to trace.
    if len(index.shape) == 3:
        x, index = (tf.transpose(a, (0, 2, 1)) for a in (x, index))
        return tf.transpose(tf.gather(x, index, batch_dims=2), (0, 2, 1))
    sample = tf.cumsum(tf.ones_like(index), axis=0, exclusive=True)
    if x.shape[0] is None or x.shape[0] != index.shape[0]:
        sample = tf.minimum(sample, tf.shape(x)[0] - 1)
    return tf.gather_nd(x, tf.stack([sample, index], axis=-1))


@keras.saving.register_keras_serializable(package="keras_node")
class TakeSteps(keras.Operation):
    """The function `take_steps` for the symbolic tensors of a functional model."""

    def call(self, x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        return _take_steps(x, index)


def increments(x: tf.Tensor) -> tf.Tensor:
    """Returns the differences from each step to the next, and zero at the last step."""
    return ops.concatenate([x[:, 1:], x[:, -1:]], axis=1) - x


def polynomial(coefficients: tf.Tensor, s: tf.Tensor) -> tf.Tensor:
    """Returns `sum over k of coefficients[..., k, :] * s^k`."""
    *lower, value = ops.unstack(coefficients, axis=-2)
    for coefficient in reversed(lower):
        value = coefficient + s * value
    return value


def differentiate(coefficients: tf.Tensor) -> tf.Tensor:
    """Returns the coefficients of the derivative of a polynomial."""
    degree = coefficients.shape[-2] - 1
    return ops.stack([k * coefficients[..., k, :] for k in range(1, degree + 1)], axis=-2)


def fill_linearly(times: tf.Tensor, values: tf.Tensor, observed: tf.Tensor) -> tf.Tensor:
    """Fills in missing values on the straight line between the observations before and after."""
    order, number = _valid_steps(observed)
    before = take_steps(order, ops.maximum(number - 1, 0))
    after = take_steps(order, ops.minimum(number - ops.cast(observed, "int32"), ops.maximum(number[:, -1:] - 1, 0)))
    times = times + ops.zeros_like(values)
    start, end = take_steps(times, before), take_steps(times, after)
    x_start, x_end = take_steps(values, before), take_steps(values, after)
    return x_start + ops.divide_no_nan(times - start, end - start) * (x_end - x_start)


def _points(t: Any, dtype: Any) -> tf.Tensor:
    """Reshapes a scalar time, or times `(batch, ..., 1)`, to `(batch, number, 1)`."""
    t = ops.convert_to_tensor(t, dtype=dtype)
    if len(t.shape) == 0:
        return ops.reshape(t, (1, 1, 1))
    if len(t.shape) == 1 or t.shape[-1] != 1:
        raise ValueError(f"`t` must be a scalar or of shape (batch, ..., 1). Received: t.shape={tuple(t.shape)}")
    return ops.reshape(t, (-1, math.prod(t.shape[1:]), 1))


def _like_time(t: Any, values: tf.Tensor) -> tf.Tensor:
    """Reshapes values `(batch, number, channels)` to the shape of `t`, with channels as the last axis."""
    shape = ops.shape(t)
    return ops.reshape(values, (-1, *shape[1:-1], values.shape[-1]))


def _check_shapes(times: tf.Tensor, values: tf.Tensor, mask: Any) -> None:
    if len(values.shape) != 3:
        raise ValueError(
            f"`values` must be of shape (batch, T, channels). Received: values.shape={tuple(values.shape)}"
        )
    steps, entries = values.shape[:2], values.shape
    if not _fits(times.shape, steps):
        raise ValueError(
            "`times` must be of shape (batch, T), with one time for every step of the observations. "
            f"Received: times.shape={tuple(times.shape)} with values.shape={tuple(values.shape)}"
        )
    if mask is not None and not (_fits(mask.shape, steps) or _fits(mask.shape, entries)):
        raise ValueError(
            "`mask` must be of shape (batch, T) or (batch, T, channels), like the observations. "
            f"Received: mask.shape={tuple(mask.shape)} with values.shape={tuple(values.shape)}"
        )


def _fits(shape: Any, expected: Any) -> bool:
    return len(shape) == len(expected) and all(None in (m, n) or m == n for m, n in zip(shape, expected, strict=True))
