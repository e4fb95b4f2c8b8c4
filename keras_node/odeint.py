"""The junction: checks arguments, makes parameters explicit, hands the problem to a gradient."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_node import gradients, solvers
from keras_node.call_context import CallContext
from keras_node.jit_compile import check_jit_compile, compiles
from keras_node.metrics import SolverMetrics
from keras_node.solution import Solution, Status, check_status
from keras_node.solve import Problem
from keras_node.times import as_numbers, prepare_times
from keras_node.trees import Nest
from keras_node.vector_field import VectorField


@tf.autograph.experimental.do_not_convert
def odeint(
    vector_field: keras.Layer | Callable,
    y0: Nest,
    ts: Any,
    *,
    args: Any = None,
    solver="tsit5",
    gradient="backsolve",
    training: bool | None = None,
    mask: Nest = None,
    throw: bool = True,
    jit_compile: bool | str = "auto",
    statistics: SolverMetrics | None = None,
) -> Solution:
    """Solves the initial value problem `dy/dt = f(t, y)`, `y(ts[0]) = y0`, for the states at `ts`.

    Differentiable with respect to `y0`, the weights of a Keras field, `args` and `ts`.

    Args:
        vector_field: a Keras layer or model, or a callable, `f(y)`, `f(t, y)` or `f(t, y, args)`; it returns the
            rate of change in the structure and shapes of `y`. `t` is a scalar, or `(batch, 1, ..., 1)` with the
            rank of `y` (of its first leaf) where samples have times of their own. A tensor that a gradient is
            wanted for goes in through `args`: of one that the field closes over the gradient is right in a graph, and
            NaN eagerly, where nothing can find it, or zero if the field reads a `tf.Variable` as well.
        y0: the initial state, a float tensor or a nest (tuple, list, dict) of them. A nested list is a nest of
            scalars; for a vector, pass an array or a tensor.
        ts: times, monotonic either way, `(T,)` or, where every sample has its own, `(T, batch)`; `T >= 2`. `ts[0]`
            is the time of `y0`. Numbers, arrays, tensors or variables, also integers. They keep the precision in which
            they come until their differences are formed, so that float64 seconds since 1970 serve a float32 state; the
            field sees `t` in the precision of the state. A repeated time gives the same state again, at no cost. A
            first derivative with respect to it is that of its own state along the field; at a time of
            `RungeKutta(step_at=...)` it is that of one side. Second derivatives with respect to times that coincide
            are not defined: with `"backsolve"` they are NaN.
        args: nest of tensors for `f(t, y, args)`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"`. A method without an
            error estimate, by name, takes 10 steps between two times. Unless it has `per_sample=True`, one error norm
            serves the whole batch: see the warning there.
        gradient: `"backsolve"` (default), `"direct"`, or an object such as `keras_node.BacksolveAdjoint()`.
        training: whether the field, and every layer in it, is in training mode. By default what Keras' call context
            says: that of the layer or model from whose `call` this function is called, else `False`.
        mask: that of the state, in its structure; passed to a field that takes it, as `mask` or by the name of its
            argument for the state, such as `y_mask`.
        throw: whether a failed solve raises `tf.errors.InvalidArgumentError`. Under XLA nothing raises. Whatever
            the mode, the states that a failed solve did not reach are NaN, and its `status` tells why.
        jit_compile: whether the solve and its gradient are XLA programs of their own, as parts of a graph (in a
            `tf.function`, in `fit`) that as a whole is none; eagerly nothing is compiled. `"auto"` (default) compiles
            where `training` is true, so that models are exported without; not with `"direct"`, which cannot; and not a
            field with convolutions where there is no device but a CPU, nor one that draws noise, which would be other
            noise in an XLA program than outside of it, nor one that closes over tensors of a graph or TensorFlow
            variables: pass these through `args`.
        statistics: the metrics of a layer with `track_stats`, which are updated with the work of the solve and of its
            gradient.

    Returns:
        A `keras_node.Solution`: `ts`; `ys`, the structure of `y0` with a new first axis of length `T`; `stats`;
        `status`, 0 for success.

    Raises:
        TypeError: for a state that is not floating-point.
        ValueError: for `ts` of another shape or not monotonic, for a field that returns another structure or shape,
            and for options that do not fit together.
        tf.errors.InvalidArgumentError: when a solve fails and `throw` is true, except under XLA.

    Example:
    >>> solution = keras_node.odeint(lambda t, y: -y, tf.constant([1.0, 2.0]), [0.0, 1.0, 2.0])
    >>> solution.ys.shape
    TensorShape([3, 2])
    """
    solver, gradient = solvers.get(solver), gradients.get(gradient)
    check_jit_compile(jit_compile, gradient)
    here = CallContext.current()
    training = here.training if training is None else training
    return CallContext(training).run(
        lambda: _odeint(vector_field, y0, ts, args, solver, gradient, training, mask, throw, jit_compile, statistics)
    )


def _odeint(vector_field, y0, ts, args, solver, gradient, training, mask, throw, jit_compile, statistics):
    """`odeint` in a call context that says whether it is `training`."""
    original, y0 = y0, _to_state(y0)
    dtype = tf.nest.flatten(y0)[0].dtype
    numbers = as_numbers(ts)
    ts, valid = _checked(prepare_times(ts, dtype))
    _check_batch(y0, ts, solver)

    t0 = tf.cast(ts[0], dtype)
    field = VectorField(vector_field, t0, y0, args, training, mask)
    jit_compile = compiles(jit_compile, gradient, training, field.pure)
    on_backward = None if statistics is None else functools.partial(statistics.backward, training=training)
    problem = Problem(field, y0, ts, field.params, solver, throw, numbers, jit_compile, on_backward)
    ys, stats, status = gradient(problem)
    if valid is not None:
        ys = _mark_invalid(valid, ys)
        valid = valid if status.shape.rank == 1 else tf.reduce_all(valid)
        status = tf.where(valid, status, int(Status.BAD_TIMES))
    if statistics is not None:
        statistics.forward(stats, status, training)
    if throw:
        ys = check_status(status, ys, "The solve")
    ys = tf.nest.map_structure(lambda y, o: tf.cast(y, o.dtype) if tf.is_tensor(o) else y, ys, original)
    return Solution(ts, ys, stats, status)


def _to_state(original: Nest) -> Nest:
    """The state as tensors of one dtype: float32, or float64 where a leaf is."""

    def leaf(y):
        if y is None or isinstance(y, tf.RaggedTensor | tf.SparseTensor):
            raise TypeError(
                "The state must be a dense tensor, or a nest (tuple, list, dict) of them; pad what is ragged, and mask "
                f"it. Received: y0={original!r}"
            )
        y = tf.convert_to_tensor(y, dtype=keras.config.floatx() if isinstance(y, float) else None)
        if y.shape.rank is None:
            raise ValueError(
                "The state must have a known rank: `tf.ensure_shape` tells it. Received: y0 of unknown shape"
            )
        if not y.dtype.is_floating:
            raise TypeError(
                "The state must be floating-point; cast it first, e.g. with `keras.ops.cast(y0, 'float32')`. "
                f"Received: y0 of dtype {y.dtype.name} and shape {tuple(y.shape)}"
            )
        return y

    state = tf.nest.map_structure(leaf, original)
    leaves = tf.nest.flatten(state)
    if not leaves:
        raise ValueError(f"The state must hold at least one tensor. Received: y0={original!r}")
    dtype = tf.float64 if any(y.dtype == tf.float64 for y in leaves) else tf.float32
    return tf.nest.map_structure(lambda y: tf.cast(y, dtype), state)


def _checked(ts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
    """The times and, where they cannot be seen yet, whether they are finite and monotonic."""
    if ts.shape.rank not in (1, 2):
        raise ValueError(f"`ts` must be 1-D or 2-D, (T,) or (T, batch). Received: ts.shape={tuple(ts.shape)}")
    if ts.shape[0] is not None and ts.shape[0] < 2:
        raise ValueError(f"`ts` must hold the initial time and at least one more. Received: ts.shape={tuple(ts.shape)}")
    values = tf.get_static_value(ts)
    if values is None:
        valid = tf.reduce_all(ts[1:] >= ts[:-1], 0) | tf.reduce_all(ts[1:] <= ts[:-1], 0)
        valid &= tf.reduce_all(tf.math.is_finite(ts), 0)
        # A solve over times that turn back would run to some end: let it run over none, and mark its result.
        return tf.where(valid, ts, tf.zeros_like(ts)), valid
    steps = np.diff(values, axis=0)
    valid = (np.all(steps >= 0, axis=0) | np.all(steps <= 0, axis=0)) & np.all(np.isfinite(values), axis=0)
    if not np.all(valid):
        sample = "" if values.ndim == 1 else f" for sample {np.argmin(valid)}"
        received = values if values.ndim == 1 else values[:, np.argmin(valid)]
        raise ValueError(
            "`ts` must be finite and monotonic, all increasing or all decreasing. "
            f"Received: ts={received.tolist()}{sample}"
        )
    return ts, None


def _check_batch(y0: Nest, ts: tf.Tensor, solver) -> None:
    """Where samples differ in time, every leaf of the state needs the same batch axis."""
    if ts.shape.rank == 1 and not solver.per_sample:
        return
    why = "`per_sample=True`" if solver.per_sample else f"`ts` of shape {tuple(ts.shape)}"
    batch = ts.shape[1] if ts.shape.rank == 2 else None
    for leaf in tf.nest.flatten(y0):
        if leaf.shape.rank == 0:
            raise ValueError(f"With {why} the state needs a batch axis. Received: a scalar in y0")
        if None not in (batch, leaf.shape[0]) and leaf.shape[0] != batch:
            raise ValueError(
                f"With {why} the first axis of the state must be the batch. Received: y0 of shape {tuple(leaf.shape)}"
                f" for a batch of {batch}"
            )
        batch = leaf.shape[0] if batch is None else batch


def _mark_invalid(valid: tf.Tensor, ys: Nest) -> Nest:
    """NaN at all but the first time of samples whose times turn back."""

    def leaf(y):
        mask = tf.reshape(
            valid,
            tf.concat([[1], tf.shape(valid), tf.ones([y.shape.rank - 1 - valid.shape.rank], tf.int32)], 0),
        )
        return tf.concat([y[:1], tf.where(mask, y[1:], float("nan"))], axis=0)

    return tf.nest.map_structure(leaf, ys)
