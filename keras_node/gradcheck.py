"""A check of a gradient on a user's own field, against finite differences."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_node import gradients, solvers
from keras_node.odeint import odeint
from keras_node.signatures import build
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.trees import Nest


class GradientCheck(NamedTuple):
    """A derivative in the random direction in which the two disagreed most.

    Attributes:
        name: of the tensor: `y0`, `ts`, the path of a weight, or the place of an argument.
        size: its number of elements.
        gradient: the derivative by the gradient method.
        finite_difference: the derivative by central differences.
        error: the distance of the two, relative to the largest of the derivatives by finite differences.
    """

    name: str
    size: int
    gradient: float
    finite_difference: float
    error: float


def gradcheck(
    vector_field: keras.Layer | Callable,
    y0: Nest,
    ts: Any,
    *,
    args: Any = None,
    solver="tsit5",
    gradient="backsolve",
    training: bool | None = None,
    num_directions: int = 3,
    epsilon: float = 1e-5,
    seed: int = 0,
    verbose: bool = True,
) -> list[GradientCheck]:
    """Compares a gradient of `odeint` with finite differences in float64, and prints a table.

    The loss is a random linear function of the states at `ts[1:]`. A derivative in a random direction `v`,

    `dL/dx v` beside `(L(x + epsilon v) - L(x - epsilon v)) / (2 epsilon)`,

    is taken for `y0`, `ts`, every weight of a layer and every float argument. Finite differences go through the same
    solver where its steps are constant, and else through one with tolerances so tight (1e-11) that what is shown is
    the whole error of a gradient, the solver's included.

    Args:
        vector_field: as in `keras_node.odeint`. A layer is copied in float64, weights included; it must be one that
            can be saved. A callable must compute in the precision of its arguments.
        y0: the initial state.
        ts: the times.
        args: nest of tensors for `f(t, y, args)`.
        solver: the solver to check with; see `keras_node.odeint`.
        gradient: the gradient to check; see `keras_node.odeint`.
        training: passed to a field that takes it. A field with noise differs from call to call and has no
            finite differences.
        num_directions: random directions for each tensor. Defaults to `3`.
        epsilon: how far to move along a direction of length 1. Defaults to `1e-5`.
        seed: of the directions. Defaults to `0`.
        verbose: whether to print the table.

    Returns:
        A list of `GradientCheck`, one for each tensor.

    Example:
    >>> checks = keras_node.gradcheck(lambda t, y: -t * y, tf.ones((3, 2)), [0.0, 1.0], verbose=False)
    >>> [check.name for check in checks]
    ['y0', 'ts']
    >>> all(check.error < 1e-2 for check in checks)
    True
    """
    rng = np.random.default_rng(seed)
    solver = solvers.get(solver)
    y0, args = _to_float64(y0), _to_float64(args)
    ts = tf.convert_to_tensor(np.asarray(ts, np.float64))
    field, weights = vector_field, []
    if isinstance(vector_field, keras.Layer):
        field = _float64_copy(vector_field, ts, y0, args)
        weights = field.trainable_variables
    float_args = [x for x in tf.nest.flatten(args) if tf.is_tensor(x) and x.dtype.is_floating]
    names = [f"y0[{i}]" for i in range(len(tf.nest.flatten(y0)))] if tf.nest.is_nested(y0) else ["y0"]
    names += ["ts", *(w.path for w in weights), *(f"args[{i}]" for i in range(len(float_args)))]
    inputs = [*tf.nest.flatten(y0), ts, *(tf.identity(w.value) for w in weights), *float_args]
    shapes = [(len(ts) - 1, *y.shape) for y in tf.nest.flatten(y0)]
    loss_weights = [tf.constant(rng.normal(size=shape)) for shape in shapes]

    def loss(inputs, solver, gradient):
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
    def by_gradient(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = loss(inputs, solver, gradients.get(gradient))
        return tape.gradient(value, inputs, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    @tf.function
    def by_solve(inputs):
        return loss(inputs, _tight(solver), "direct")

    checks = []
    for i, (name, x, computed) in enumerate(zip(names, inputs, by_gradient(inputs), strict=True)):
        pairs = []
        for _ in range(num_directions):
            direction = rng.normal(size=x.shape)
            direction = tf.constant(direction / max(np.linalg.norm(direction), 1e-300))
            ends = [by_solve([*inputs[:i], x + sign * epsilon * direction, *inputs[i + 1 :]]) for sign in (1, -1)]
            pairs.append((float(tf.reduce_sum(computed * direction)), float(ends[0] - ends[1]) / (2 * epsilon)))
        scale = max(max(abs(difference) for _, difference in pairs), 1e-300)
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        checks.append(GradientCheck(name, int(tf.size(x)), *worst, abs(worst[0] - worst[1]) / scale))
    if verbose:
        _print(checks)
    return checks


def _tight(solver: RungeKutta) -> RungeKutta:
    """The same solver if its steps are constant, else one that is next to exact."""
    if not solver.adaptive:
        return solver
    return RungeKutta(rtol=1e-11, atol=1e-11, max_steps=1_000_000, per_sample=solver.per_sample, step_at=solver.step_at)


def _to_float64(nest: Any) -> Any:
    def leaf(x):
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
    """A serialized object with every policy in it replaced."""
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
