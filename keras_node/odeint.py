"""The entrance to every solve: it checks the arguments, makes the field pure, and passes the problem to a gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_node import gradients, solvers, trees
from keras_node.arguments import positive_integer
from keras_node.call_context import CallContext
from keras_node.checks import check_batch, check_events, check_jacobian, check_size, check_tolerances, checked_times
from keras_node.event_functions import EventFunctions
from keras_node.events import Event, as_events
from keras_node.gradients import Gradient
from keras_node.hybrid import solve_hybrid
from keras_node.jit_compile import CompileLater, check_jit_compile, compiles
from keras_node.metrics import SolverMetrics
from keras_node.signatures import call_arguments
from keras_node.solution import Solution, Status, check_status
from keras_node.solve import Problem
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.times import Times, as_numbers, prepare_times
from keras_node.trees import Nest
from keras_node.vector_field import VectorField, as_tensors


@tf.autograph.experimental.do_not_convert
def odeint(
    vector_field: keras.Layer | Callable,
    y0: Nest,
    ts: Times,
    *,
    args: Nest = None,
    solver: RungeKutta | str = "tsit5",
    gradient: Gradient | str | None = None,
    training: bool | None = None,
    mask: Nest = None,
    jacobian: Callable[..., tf.Tensor] | None = None,
    event: Event | Sequence[Event] | None = None,
    max_events: int = 32,
    jumps: tuple[Times, Nest] | None = None,
    throw: bool = True,
    jit_compile: bool | str | CompileLater = "auto",
    statistics: SolverMetrics | None = None,
    on_solution: Callable[[Any, Solution], None] | None = None,
) -> Solution:
    """Solves an initial value problem and returns the states at the times `ts`.

    `dy/dt = f(t, y)`, `y(ts[0]) = y0`

    You can differentiate the states with respect to `y0`, the weights of a Keras field, `args` and `ts`.

    Args:
        vector_field: the field `f`, a Keras layer or model, or a callable. It takes `(y)`, `(t, y)` or `(t, y, args)`,
            and returns the rate of change in the structure and shapes of `y`. `t` is a scalar; if samples have their
            own times, it is `(batch, 1, ..., 1)` with the rank of `y` (of its first leaf). If you need the gradient
            with respect to a tensor, pass it through `args`. A field may also close over the tensor, but then the
            gradient is right only in a graph. In eager mode nothing can find the tensor, and its gradient is NaN, or
            `None` if the field reads a `tf.Variable` as well.
        y0: the initial state, a float tensor or a nest (tuple, list, dict) of them. A nested list is a nest of
            scalars, so pass a vector as an array or a tensor.
        ts: the times, `(T,)`, or `(T, batch)` if every sample has its own, with `T >= 2`, in any unit. They all
            increase or all decrease, and may repeat. `ts[0]` is the time of `y0`. They are numbers, arrays, tensors or
            variables, and may be integers. Their differences are formed before they are rounded to the precision of the
            state, so you can use float64 seconds since 1970 with a float32 state. The field sees `t` in the precision
            of the state. A repeated time gives the same state again, at no cost. The derivative with respect to a time
            is the field at its state, also for repeated times. At a time of `RungeKutta(step_at=...)` it is one-sided.
            Second derivatives with respect to times that coincide are not defined: with `"backsolve"` they are NaN.
        args: nest of tensors for a field `f(t, y, args)`. Floats and arrays of them take the precision of the
            state. Defaults to `None`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"`. If you pass only the name of
            a method without an error estimate, it takes 10 steps between two times. Unless the solver has
            `per_sample=True`, the whole batch shares one error norm, which can hide an error of a single sample; see
            `keras_node.RungeKutta`.
        gradient: how to differentiate the solve: `"backsolve"`, `"checkpointed"`, `"direct"`, `"reversible"`, or an
            object such as `keras_node.BacksolveAdjoint()`. Defaults to `None`, for `"backsolve"`; with an implicit
            method `"checkpointed"`, because a stiff field cannot be solved backward; and with a symplectic method
            `"reversible"`.
        training: whether the field, and every layer in it, is in training mode. By default it is the mode of the layer
            or model whose `call` calls this function, and `False` outside of any layer.
        mask: the mask of the state, in the structure of the state. A field receives it if it has an argument `mask`, or
            an argument with the name of its state and `_mask`, such as `y_mask`. Defaults to `None`.
        jacobian: the Jacobian of the field, for an implicit method: a callable of `(y)`, `(t, y)` or `(t, y, args)`
            that returns `(batch, n, n)`, or `(n, n)` if it is the same for all samples, for samples of `n` numbers.
            Entry `[i, j]` is the derivative of rate `i` by number `j`. By default it is the method `jacobian` of the
            field, if it has one; otherwise `n` vector-Jacobian products compute it. It speeds up a solve but does not
            change it: an approximate one costs more iterations, and gradients do not use it.
        event: a `keras_node.Event` or a list of them: zeros of functions of time and state, at which the solve of a
            sample ends or its state jumps. Every sample has its own event times, which `solution.events` holds. After a
            terminal event, the states at later `ts` are the state at the event. At the time of an event with a reset,
            and of a jump, the state is the one before it. If several events happen to a sample at the same time, the
            first of the list comes first. With events, the first axis of the state is the batch, and the field sees
            `t` as `(batch, 1, ..., 1)`. Defaults to `None`.
        max_events: the largest number of events of a sample, if not all of them are terminal. One more ends the solve
            of the sample with status 6. Defaults to `32`.
        jumps: a pair `(times, amounts)` of jumps whose times are known, such as doses. At each of the times, `(D,)`, or
            `(D, batch)` if samples have their own, the solve adds an amount to the state. The amounts have the
            structure of the state with one or two more axes, `(D, ...)` or `(D, batch, ...)`. The times need not be
            sorted. A jump before the first time or after the last, also at infinity, has no effect, so that you can
            pad. You can differentiate with respect to times and amounts. Defaults to `None`.
        throw: whether a failed solve raises `tf.errors.InvalidArgumentError`. If the function or
            model around the solve is compiled with XLA, nothing can raise. In every mode, the states that a failed
            solve did not reach are NaN, and `status` says why. Defaults to `True`.
        jit_compile: whether to compile the solve and its gradient with XLA as separate programs, inside a graph (a
            `tf.function` or `fit`) that is not compiled as a whole. In eager mode nothing is compiled. `"auto"`
            (default) compiles in training only, so that exported models do not contain XLA programs. It does not
            compile with `"direct"`, which does not allow it; nor a field with convolutions if the only device is a CPU,
            where XLA makes them slow; nor a field that draws noise, because XLA would draw other noise; nor a field
            that closes over tensors of a graph or reads TensorFlow variables: pass these through `args`. A layer of
            this package compiles later, see `keras_node.ODELayer`.
        statistics: the metrics of a layer with `track_stats`, to update with the work of the solve and of its gradient.
            Defaults to `None`.
        on_solution: a function that is called with the field of the solve, which has its weights, noise and arguments,
            and with the solution. A layer uses it to penalize the path. Defaults to `None`.

    Returns:
        A `keras_node.Solution` with the times `ts`, the states `ys` in the structure of `y0` with a new first axis of
        length `T`, the work `stats`, and `status`, which is 0 for success.

    Raises:
        TypeError: for a state that is not floating-point, or not a dense tensor.
        ValueError: for `ts` of another shape or not monotonic, for an event function that does not return one number
            per sample, for `jumps` of another structure or shape, for a field that returns another structure or shape,
            and for options that are unknown or contradict each other.
        tf.errors.InvalidArgumentError: if a solve fails and `throw` is true, except under XLA.

    Example:
        >>> solution = keras_node.odeint(lambda t, y: -y, tf.constant([1.0, 2.0]), [0.0, 1.0, 2.0])
        >>> solution.ys.shape
        TensorShape([3, 2])

    Reference:

        - Chen, Rubanova, Bettencourt & Duvenaud (2018), "Neural Ordinary Differential Equations", arXiv:1806.07366.
        - Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", chapter II.
    """
    solver = solvers.get(solver)
    gradient = gradients.get(gradient) or gradients.default(solver)
    gradients.check(gradient, solver)
    check_jit_compile(jit_compile, gradient)
    check_jacobian(jacobian, solver)
    here = CallContext.current()
    training = here.training if training is None else training
    return CallContext(training).run(
        functools.partial(
            _odeint,
            vector_field,
            y0,
            ts,
            args,
            solver,
            gradient,
            training,
            mask,
            jacobian,
            as_events(event),
            positive_integer("max_events", max_events),
            jumps,
            throw,
            jit_compile,
            statistics,
            on_solution,
        )
    )


def _odeint(
    vector_field: keras.Layer | Callable,
    y0: Nest,
    ts: Times,
    args: Nest,
    solver: RungeKutta,
    gradient: Gradient,
    training: bool | None,
    mask: Nest,
    jacobian: Callable[..., tf.Tensor] | None,
    events: list[Event],
    max_events: int,
    jumps: tuple[Times, Nest] | None,
    throw: bool,
    jit_compile: bool | str | CompileLater,
    statistics: SolverMetrics | None,
    on_solution: Callable[[Any, Solution], None] | None,
) -> Solution:
    """Does the work of `odeint`, in a call context with the right `training`."""
    if isinstance(vector_field, keras.Layer):
        _refuse_numbers(y0)
    original, y0 = y0, _to_state(y0)
    dtype = tf.nest.flatten(y0)[0].dtype
    numbers = as_numbers(ts)
    if numbers is not None and numbers.size == 0:
        numbers = None
    ts, valid = checked_times(_hide_empty_batch(prepare_times(ts, dtype, axis=0), axis=1))
    hybrid = bool(events) or jumps is not None
    check_batch(y0, ts, solver, hybrid)
    check_events(events, solver, gradient)
    check_tolerances(y0, solver, gradient)
    check_size(y0, ts, solver)

    times = ts
    if ts.shape.rank == 1 and (hybrid or solver.per_sample):
        times = ts[:, None] + tf.zeros(tf.shape(tf.nest.flatten(y0)[0])[:1], ts.dtype)
    t0 = tf.cast(times[0], dtype)
    times = times if numbers is None else ts  # the clocks of numbers are computed once for all samples
    functions, field_args = None, args
    if events:
        args = as_tensors(args, dtype)
        functions = EventFunctions(events, t0, y0, args, training)
        # The arguments may be those of the event alone.
        field_args = args if call_arguments(vector_field)[0] == 3 or not functions.take_args else None
    field = VectorField(vector_field, t0, y0, field_args, training, mask, jacobian)
    compiled = compiles(jit_compile, gradient, training, field.pure, tf.nest.flatten(y0)[0])
    on_backward = None if statistics is None else functools.partial(statistics.backward, training=training)
    problem = Problem(
        field,
        y0,
        times,
        field.params,
        solver,
        throw,
        numbers,
        times_vary=numbers is None,
        jit_compile=compiled,
        on_backward=on_backward,
        exported=training is not True,
    )
    history = None
    if functions is None and jumps is None:
        ys, stats, status, _ = gradient(problem)
    else:
        (ys, stats, status, _), history = solve_hybrid(problem, gradient, functions, jumps, max_events)
    if valid is not None:
        ys = _mark_invalid(valid, ys)
        valid = valid if status.shape.rank == 1 else tf.reduce_all(valid)
        status = tf.where(valid, status, int(Status.BAD_TIMES))
    if statistics is not None:
        statistics.forward(stats, status, training)
    if throw:
        ys = check_status(status, ys, "The solve", stats)
    solution = Solution(ts, ys, stats, status, history)
    if on_solution is not None:
        on_solution(field, solution)
    ys = tf.nest.map_structure(lambda y, o: tf.cast(y, o.dtype) if tf.is_tensor(o) else y, ys, original)
    return solution._replace(ys=ys)


def _refuse_numbers(y0: Nest) -> None:
    """Raises for a list of numbers, which is a list of states without an axis, and no layer takes these."""
    leaves = tf.nest.flatten(y0) if tf.nest.is_nested(y0) else []
    if leaves and all(isinstance(y, int | float) for y in leaves):
        raise ValueError(
            "A list of numbers is a list of that many states. Pass an array with a batch axis to a layer, such as "
            f"`np.array([[1.0, 2.0]])` for a batch of one sample. Received: y0={y0!r}"
        )


def _to_state(original: Nest) -> Nest:
    """Returns the state as tensors of the same dtype: float64 if any leaf is float64, else float32."""

    def leaf(y: Any) -> tf.Tensor:
        if y is None or isinstance(y, tf.RaggedTensor | tf.SparseTensor):
            raise TypeError(
                "The state must be a dense tensor, or a nest (tuple, list, dict) of them: pad what is ragged, and mask "
                "the padding. "
                f"Received: y0={original!r}"
            )
        y = tf.convert_to_tensor(y, dtype=keras.config.floatx() if isinstance(y, float) else None)
        if y.shape.rank is None:
            raise ValueError(
                "The state must have a known rank: set its shape by `tf.ensure_shape`. Received: y0 of unknown shape"
            )
        if not y.dtype.is_floating:
            raise TypeError(
                "The state must be floating-point: cast it first, for example by `keras.ops.cast(y0, 'float32')`. "
                f"Received: y0 of dtype {y.dtype.name} and shape {tuple(y.shape)}"
            )
        return y

    state = tf.nest.map_structure(leaf, original)
    leaves = tf.nest.flatten(state)
    if not leaves:
        raise ValueError(f"The state must hold at least one tensor. Received: y0={original!r}")
    dtype = tf.float64 if any(y.dtype == tf.float64 for y in leaves) else tf.float32
    return tf.nest.map_structure(lambda y: _hide_empty_batch(tf.cast(y, dtype)), state)


def _hide_empty_batch(x: tf.Tensor, axis: int = 0) -> tf.Tensor:
    """Makes an empty batch one of unknown size. TensorFlow's optimizer of graphs divides by zero if it knows better."""
    if tf.executing_eagerly() or x.shape.rank is None or x.shape.rank <= axis or x.shape[axis] != 0:
        return x
    shape = x.shape.as_list()
    return tf.raw_ops.PlaceholderWithDefault(input=x, shape=[*shape[:axis], None, *shape[axis + 1 :]])


def _mark_invalid(valid: tf.Tensor, ys: Nest) -> Nest:
    """Puts NaN at all times but the first, in samples whose times are not valid."""

    def leaf(y: tf.Tensor) -> tf.Tensor:
        mask = trees.expand(valid, y.shape.rank - 1)
        return tf.concat([y[:1], tf.where(mask, y[1:], float("nan"))], axis=0)

    return tf.nest.map_structure(leaf, ys)
