"""A check of the gradient of your own field against finite differences."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_node import gradients, solvers, trees
from keras_node.arguments import positive_integer, positive_number
from keras_node.checks import checked_times
from keras_node.gradients import Gradient
from keras_node.odeint import odeint
from keras_node.signatures import build
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.times import Times, prepare_times
from keras_node.trees import Nest


class GradientCheck(NamedTuple):
    """The two derivatives of a tensor in the random direction in which they differ most.

    Attributes:
        name: name of the tensor: `"y0"`, `"ts"`, the path of a weight, or a place such as `"args[0]"`.
        size: number of elements of the tensor.
        gradient: the derivative by the gradient method.
        finite_difference: the derivative by central finite differences.
        error: the absolute difference of the two, divided by the largest of the finite differences in all directions.
    """

    name: str
    size: int
    gradient: float
    finite_difference: float
    error: float


def gradcheck(
    vector_field: keras.Layer | Callable,
    y0: Nest,
    ts: Times,
    *,
    args: Any = None,
    solver: RungeKutta | str = "tsit5",
    gradient: Gradient | str | None = None,
    training: bool | None = None,
    num_directions: int = 3,
    epsilon: float = 1e-5,
    seed: int = 0,
    verbose: bool = True,
) -> list[GradientCheck]:
    """Compares a gradient of `odeint` with finite differences in float64, and prints a table.

    The loss `L` is a random linear function of the states at `ts[1:]`. For each tensor `x` (`y0`, `ts`, every weight
    of a layer and every float argument) and random directions `v` of length 1, the check compares the derivatives

    `dL/dx v`

    `(L(x + epsilon v) - L(x - epsilon v)) / (2 epsilon)`

    The second one uses the same solver if the steps are constant. For adaptive steps it uses a solver with very small
    tolerances (1e-11). Then the difference is the whole error of the gradient, including the error of the solver.

    Args:
        vector_field: the field, as in `keras_node.odeint`. A layer is copied in float64 with its weights, so it must be
            a layer that Keras can save. A callable must compute in the precision of its arguments.
        y0: the initial state. It is converted to float64.
        ts: the times, `(T,)` or `(T, batch)`. They are converted to float64. Times that are equal move together.
        args: nest of tensors for a field `f(t, y, args)`. Defaults to `None`.
        solver: the solver to check with, as in `keras_node.odeint`. Defaults to `"tsit5"`.
        gradient: the gradient to check, as in `keras_node.odeint`. Defaults to `None`.
        training: passed to a field that takes it. A field with noise differs from call to call, so it has no
            finite differences. Defaults to `None`.
        num_directions: number of random directions for each tensor. Defaults to `3`.
        epsilon: how far to move along a direction, above 0. Times move by less, 1e-4 of the shortest interval, if that
            is shorter, but so far that float64 shows it. Defaults to `1e-5`.
        seed: seed of the random loss and directions. Defaults to `0`.
        verbose: whether to print the table. Defaults to `True`.

    Returns:
        A list of `GradientCheck`, one for each tensor.

    Raises:
        TypeError, ValueError: for arguments that `keras_node.odeint` refuses, and for a number of directions or an
            `epsilon` that is not above 0.

    Example:
        >>> checks = keras_node.gradcheck(lambda t, y: -t * y, tf.ones((3, 2)), [0.0, 1.0], verbose=False)
        >>> [check.name for check in checks]
        ['y0', 'ts']
        >>> all(check.error < 1e-2 for check in checks)
        True
    """
    rng = np.random.default_rng(seed)
    solver = solvers.get(solver)
    num_directions = positive_integer("num_directions", num_directions)
    epsilon = positive_number("epsilon", epsilon)
    y0 = tf.nest.map_structure(lambda y: tf.cast(y, tf.float64), _to_float64(y0))
    args = _to_float64(args)
    ts, _ = checked_times(prepare_times(ts, "float64"))
    field, weights = vector_field, []
    if isinstance(vector_field, keras.Layer):
        field = _float64_copy(vector_field, ts, y0, args)
        weights = field.trainable_variables
    float_args = [x for x in tf.nest.flatten(args) if trees.is_float(x)]
    names = [f"y0[{i}]" for i in range(len(tf.nest.flatten(y0)))] if tf.nest.is_nested(y0) else ["y0"]
    names += ["ts", *(w.path for w in weights), *(f"args[{i}]" for i in range(len(float_args)))]
    inputs = [*tf.nest.flatten(y0), ts, *(tf.identity(w.value) for w in weights), *float_args]
    shapes = [(len(ts) - 1, *y.shape) for y in tf.nest.flatten(y0)]
    loss_weights = [tf.constant(rng.normal(size=shape)) for shape in shapes]

    def loss(inputs: list[tf.Tensor], solver: RungeKutta, gradient: Gradient | str | None) -> tf.Tensor:
        flat = iter(inputs)
        state = tf.nest.map_structure(lambda _: next(flat), y0)
        times = next(flat)
        scope = keras.StatelessScope([(w, next(flat)) for w in weights])
        arguments = tf.nest.map_structure(lambda x: next(flat) if any(x is a for a in float_args) else x, args)
        with scope:
            ys = odeint(field, state, times, args=arguments, solver=solver, gradient=gradient, training=training).ys
        products = [tf.reduce_sum(w * y[1:]) for w, y in zip(loss_weights, tf.nest.flatten(ys), strict=True)]
        return tf.add_n(products)

    @tf.function
    def by_gradient(inputs: list[tf.Tensor]) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = loss(inputs, solver, gradients.get(gradient))
        return tape.gradient(value, inputs, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    @tf.function
    def by_solve(inputs: list[tf.Tensor]) -> tf.Tensor:
        return loss(inputs, _tight(solver), "direct")

    checks = []
    for i, (name, x, computed) in enumerate(zip(names, inputs, by_gradient(inputs), strict=True)):
        pairs: list[tuple[float, float]] = []
        for _ in range(num_directions):
            direction, distance = rng.normal(size=x.shape), float(epsilon)
            if name == "ts":
                direction, distance = _of_times(x.numpy(), direction, epsilon)
            direction *= distance / max(float(np.linalg.norm(direction)), 1e-300)
            points = [x + direction, x - direction]
            ends = [by_solve([*inputs[:i], point, *inputs[i + 1 :]]) for point in points]
            # This is how far the points are from each other after rounding.
            moved = points[0] - points[1]
            change = float(tf.reduce_sum(computed * moved)), float(ends[0] - ends[1])
            pairs.append((change[0] / (2 * distance), change[1] / (2 * distance)))
        scale = max(max(abs(difference) for _, difference in pairs), 1e-300)
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        checks.append(GradientCheck(name, int(tf.size(x)), *worst, abs(worst[0] - worst[1]) / scale))
    if verbose:
        _print(checks)
    return checks


def _of_times(ts: np.ndarray, direction: np.ndarray, epsilon: float) -> tuple[np.ndarray, float]:
    """A direction in which times can move, and how far they can, so that they stay in order and equal ones equal."""
    gaps = np.abs(np.diff(ts, axis=0))
    for i in np.flatnonzero(np.any(gaps == 0, axis=tuple(range(1, ts.ndim)))):
        direction[i + 1] = np.where(gaps[i] == 0, direction[i], direction[i + 1])
    shortest = float(np.min(gaps, where=gaps > 0, initial=np.inf))
    visible = 16 * float(np.spacing(np.max(np.abs(ts))))
    return direction, min(max(min(epsilon, 1e-4 * shortest), visible), shortest / 4)


def _tight(solver: RungeKutta) -> RungeKutta:
    """The same solver if its steps are constant, otherwise one with hardly any error."""
    if not solver.adaptive:
        return solver
    return RungeKutta(rtol=1e-11, atol=1e-11, max_steps=1_000_000, per_sample=solver.per_sample, step_at=solver.step_at)


def _to_float64(nest: Nest) -> Nest:
    """The nest with its floating-point leaves in float64."""

    def leaf(x: Any) -> tf.Tensor | None:
        if x is None:
            return None
        x = tf.convert_to_tensor(x)
        return tf.cast(x, tf.float64) if x.dtype.is_floating else x

    return tf.nest.map_structure(leaf, nest)


def _float64_copy(layer: keras.Layer, ts: tf.Tensor, y0: Nest, args: Any) -> keras.Layer:
    """A copy of a layer that computes in float64, with the same weights."""
    own_times = ts.shape.rank == 2
    t = tf.zeros((ts.shape[1],) + (1,) * (tf.nest.flatten(y0)[0].shape.rank - 1) if own_times else (), tf.float64)
    if not layer.built:
        single = tf.nest.map_structure(lambda x: x if x is None else tf.cast(x, layer.variable_dtype), (t, y0, args))
        build(layer, *single)
    copy = keras.saving.deserialize_keras_object(_with_float64(keras.saving.serialize_keras_object(layer)))
    if not copy.built:
        build(copy, t, y0, args)
    copy.set_weights([np.asarray(w, np.float64) for w in layer.get_weights()])
    return copy


def _with_float64(config: Any) -> Any:
    """A serialized object in which float64 replaces every precision."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {**config["config"], "name": "float64"}}
        return {key: "float64" if key == "dtype" and _is_float(x) else _with_float64(x) for key, x in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_with_float64(value) for value in config)
    return config


def _is_float(policy: Any) -> bool:
    return isinstance(policy, str) and "float" in policy


def _print(checks: list[GradientCheck]) -> None:
    width = max(len(check.name) for check in checks)
    print(f"{'':{width}} {'elements':>9} {'gradient':>14} {'difference':>14} {'relative error':>15}")
    for check in checks:
        print(
            f"{check.name:{width}} {check.size:9} {check.gradient:14.6g} {check.finite_difference:14.6g} "
            f"{check.error:15.1e}"
        )
