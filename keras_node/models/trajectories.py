"""Batches of trajectories: their observations, and the windows in which a model learns from them."""

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.control import control_path, fill_linearly, is_observed, last_valid, running_maximum
from keras_node.layers.irregular_times import check_order, elapsed_times
from keras_node.times import as_numbers, prepare_times, refuse_rounded_arrays

_FORMS = (
    "Trajectories must be `(times, values)`, `(times, values, mask)` or a dictionary with these keys, and a data set "
    "yields `((times, values),)`. "
)
_KEYS = ("times", "values", "mask", "controls", "jump_times", "jump_amounts", "index")


class Trajectories(NamedTuple):
    """Observations of a batch of trajectories, prepared for a solve.

    Attributes:
        times: `(batch, T)`.
        values: `(batch, T, D)`, with the missing values filled in linearly.
        observed: boolean, in the shape of `values`: which of them were observed.
        controls: a `keras_node.ControlPath` with a knot at each step, or `None` if there are no controls.
        jumps: `(times, amounts)` of shapes `(batch, J)` and `(batch, J, D)`, or `()` if there are none.
        index: `(batch,)`, the number of each trajectory in the training data, or `None` if it is not known.
    """

    times: tf.Tensor
    values: tf.Tensor
    observed: tf.Tensor
    controls: Any = None
    jumps: tuple = ()
    index: Any = None


def as_dictionary(x: Any) -> dict[str, Any]:
    """Returns the observations that a user passes, or their shapes, as a dictionary."""
    if isinstance(x, dict):
        unknown = sorted(set(x) - set(_KEYS))
        if not unknown and {"times", "values"} <= set(x) and ("jump_times" in x) == ("jump_amounts" in x):
            return x
        raise ValueError(
            "Trajectories need the keys `times` and `values`, and may have `mask`, `controls`, and both `jump_times` "
            f"and `jump_amounts`. Received: {sorted(x)}"
        )
    if isinstance(x, list | tuple) and x and all(d is None or isinstance(d, int) for d in x):
        raise ValueError(f"{_FORMS}Received: one array of shape {tuple(x)}")
    if isinstance(x, list | tuple) and len(x) in (2, 3):
        return dict(zip(_KEYS, x, strict=False))
    length = f" of length {len(x)}" if isinstance(x, list | tuple) else ""
    raise ValueError(f"{_FORMS}Received: {type(x).__name__}{length}")


def prepare(x: Any, layer: keras.Layer, interpolation: str, keep_times: bool = False) -> Trajectories:
    """Checks a batch of observations, and fills in what is missing.

    Args:
        x: the observations.
        layer: the model that receives them. Its variables have the precision of the state.
        interpolation: the kind of path through the controls.
        keep_times: whether steps without observations keep their times, as long as these do not go back, as padding
            does. By default they take the time of the last observation, so that what they hold has no effect.
    """
    x, dtype = as_dictionary(x), layer.variable_dtype
    times, values = prepare_times(x["times"], dtype), ops.convert_to_tensor(x["values"])
    mask = None if x.get("mask") is None else ops.cast(x["mask"], "bool")
    check_shapes({**x, "times": times, "values": values, "mask": mask})
    values = ops.cast(values, dtype)
    observed = is_observed(values, mask)
    values = ops.where(observed, values, 0)
    given = ops.broadcast_to(times, ops.shape(values)[:2])
    valid = ops.any(observed, axis=-1)
    ordered = _in_order(given, valid)
    with tf.control_dependencies(check_order(ordered, given, layer)):
        values = ops.where(ordered[:, None, None], values, float("nan"))
    times = last_valid(ops.where(valid, given, 0), valid)
    values = fill_linearly(ops.expand_dims(ops.cast(times, dtype), -1), values, observed)
    if keep_times or "controls" in x:
        kept = running_maximum(ops.maximum(ops.where(ops.isfinite(given), given, times), times))
    jumps: tuple = ()
    if "jump_times" in x:
        jumps = prepare_times(x["jump_times"], dtype), ops.cast(x["jump_amounts"], dtype)
    controls = None
    if "controls" in x:
        controls = control_path(kept, ops.cast(x["controls"], dtype), interpolation=interpolation)
    index = ops.cast(x["index"], "int32") if "index" in x else None
    return Trajectories(kept if keep_times else times, values, observed, controls, jumps, index)


def check_shapes(x: dict[str, Any]) -> None:
    """Checks the shapes of observations, as far as they are known."""
    given = {name: part for name, part in x.items() if part is not None}
    shapes = {name: tf.TensorShape(getattr(part, "shape", None) or np.shape(part)) for name, part in given.items()}
    values = shapes["values"]
    if values.rank != 3:
        raise ValueError(
            "`values` must be of shape (batch, T, D). A single trajectory needs an axis for the batch, and a single "
            f"channel one for the channels. Received: values of shape {tuple(values)}"
        )
    batch, steps, dim = values
    if steps is not None and steps < 2:
        raise ValueError(f"Trajectories must have 2 steps or more. Received: values of shape {tuple(values)}")
    number = shapes["jump_times"][1] if "jump_times" in shapes and shapes["jump_times"].rank == 2 else None
    allowed = {
        "times": {"(batch, T)": [batch, steps], "(T,)": [steps]},
        "mask": {"(batch, T)": [batch, steps], "(batch, T, D)": [batch, steps, dim]},
        "controls": {"(batch, T, C)": [batch, steps, None]},
        "jump_times": {"(batch, J)": [batch, number]},
        "jump_amounts": {"(batch, J, D)": [batch, number, dim]},
    }
    for name in allowed:
        if name in shapes and not any(shapes[name].is_compatible_with(shape) for shape in allowed[name].values()):
            received = {name: tuple(shape) for name, shape in shapes.items() if name in ("values", *allowed)}
            raise ValueError(
                f"`{name}` must be of shape {' or '.join(allowed[name])} for values of shape (batch, T, D). "
                f"Received the shapes: {received}"
            )


def windows(trajectories: Trajectories, length: int | tf.Tensor) -> tuple[Trajectories, int | tf.Tensor]:
    """Cuts trajectories into windows of `length` intervals. The last step of a window is the first of the next one.

    Returns:
        The windows, `(batch * W, length + 1, ...)`, those of a trajectory one after the other, and their number `W` in
        a trajectory. Steps beyond the end of a trajectory are not observed, and repeat its last time.
    """
    batch, steps = ops.shape(trajectories.times)  # integers, or tensors where they are not known
    number = -(-(steps - 1) // length)
    places = ops.arange(number)[:, None] * length + ops.arange(length + 1)
    inside = ops.tile(places < steps, [batch, 1])
    places = ops.reshape(ops.minimum(places, steps - 1), (-1,))

    def cut(x: Any) -> Any:
        return ops.reshape(ops.take(x, places, axis=1), (-1, length + 1, *x.shape[2:]))

    times, values, observed = (cut(x) for x in trajectories[:3])
    return (
        Trajectories(
            times,
            values,
            observed & inside[..., None],
            None if trajectories.controls is None else tf.nest.map_structure(cut, trajectories.controls),
            tuple(ops.repeat(x, number, axis=0) for x in trajectories.jumps),
        ),
        number,
    )


def until(trajectories: Trajectories, horizon: tf.Tensor) -> Trajectories:
    """Ends trajectories after so many intervals: later steps are not observed, and repeat the time of the last one.

    A solve that has reached its last time costs nothing more, so a shorter horizon is cheaper. And shapes do not depend
    on it, so nothing is traced again when it grows.
    """
    steps = ops.shape(trajectories.times)[1]
    place = ops.minimum(ops.arange(steps), ops.cast(horizon, "int32"))
    inside = ops.arange(steps) <= ops.cast(horizon, "int32")
    return trajectories._replace(
        times=ops.take(trajectories.times, place, axis=1), observed=trajectories.observed & inside[:, None]
    )


def are_arrays(x: Any) -> bool:
    """Whether the data are arrays or lists of numbers, and not a data set or a generator."""
    return isinstance(x, dict | list | tuple)


def dictionary_of_arrays(x: Any, layer: keras.Layer) -> dict[str, Any]:
    """Returns trajectories as a dictionary of arrays, with times for each trajectory, after it has checked them."""
    x = {name: _array(name, part) for name, part in as_dictionary(x).items() if part is not None}
    check_shapes(x)
    check_finite(x)
    x["times"] = np.broadcast_to(x["times"], x["values"].shape[:2])
    times = as_numbers(x["times"])
    check_order(_in_order(times, np.any(~np.isnan(observed_values(x)), axis=-1)), times, layer)
    return x


def check_finite(x: dict[str, np.ndarray]) -> None:
    """Checks that what was observed is finite. The mean of one infinite value would spoil a model for good."""
    given = {"values": (observed_values(x), "NaN, or false in `mask`, marks a missing value")}
    if "controls" in x:
        given["controls"] = x["controls"], "NaN marks a missing value"
    if "jump_amounts" in x:
        happens = np.isfinite(x["jump_times"].astype("float64"))
        given["jump_amounts"] = np.where(happens[..., None], x["jump_amounts"], 0), "a jump at infinity does not happen"
    for name, (part, advice) in given.items():
        infinite = np.argwhere(np.isinf(part.astype("float64")))
        if infinite.size:
            raise ValueError(
                f"`{name}` must be finite; {advice}. "
                f"Received: {part[tuple(infinite[0])]} at {name}[{', '.join(map(str, infinite[0]))}]"
            )


def _array(name: str, part: Any) -> np.ndarray:
    try:
        if not isinstance(part, tf.RaggedTensor):
            return np.asarray(part)
        received, cause = "a RaggedTensor", None
    except ValueError as error:  # from NumPy
        received, cause = "lists of unequal length", error
    raise ValueError(
        f"`{name}` must be an array. Pad trajectories of unequal length with NaN, for which "
        f"`keras_node.utils.series_from_frame` is a way. Received: {received}"
    ) from cause


def arrays_for_keras(x: Any, layer: keras.Layer) -> dict[str, Any]:
    """Returns `dictionary_of_arrays`, for Keras to cut batches of it, which rounds times."""
    x = dictionary_of_arrays(x, layer)
    refuse_rounded_arrays(x["times"])
    return x


def _in_order(times: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Whether the times of valid steps do not decrease, `(batch,)`."""
    elapsed, _ = elapsed_times(times, valid, None, backwards=False)
    return ops.all(ops.isfinite(elapsed) & (elapsed >= 0), axis=1)


def observed_values(x: dict[str, Any]) -> np.ndarray:
    """Returns the values of arrays, with NaN where the mask is false."""
    mask = np.asarray(x.get("mask", True), bool)
    return np.where(mask[..., None] if mask.ndim == 2 else mask, np.asarray(x["values"], "float64"), np.nan)


def center_and_scale(x: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation of each channel of what was observed. That of a constant is 1."""
    values = observed_values(x).reshape(-1, x["values"].shape[-1])
    counts = np.maximum(np.sum(~np.isnan(values), axis=0), 1)
    center = np.nansum(values, axis=0) / counts
    scale = np.sqrt(np.nansum((values - center) ** 2, axis=0) / counts)
    return center, np.where(scale > 0, scale, 1)
