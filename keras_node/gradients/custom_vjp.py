"""Computations with a gradient that this package defines.

How a solve and its gradient run depends on the mode:

- In eager mode, both run operation by operation. A tape records only the call of `custom_vjp`, and nothing inside it.
- In a graph, both are parts of the graph. With `jit_compile`, each is an XLA program: a `tf.function` in the graph. If
  `jit_compile` is a tensor, it chooses each time between the program and the graph.
- If XLA compiles the whole graph, both are parts of that program.
- A second derivative differentiates the computation of the gradient. A loop in an XLA program cannot pass the values
  that its gradient needs out of the program. This is why `differentiated_as` computes the gradient again, outside it.

`tf.vectorized_map` ignores custom gradients and differentiates what is inside them. There, nothing depends on the
inputs any more, so the gradient would be zero; it is made NaN instead.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from keras_node import trees
from keras_node.loop_state import is_finite
from keras_node.pure_function import PureFunction
from keras_node.solution import Stats, Status, check_status
from keras_node.solve import Problem, Stop, Trajectory
from keras_node.trees import Nest
from keras_node.vjp import vjp

Gradients: TypeAlias = tuple[Nest, tf.Tensor, list[tf.Tensor]]  # of `y0`, `ts` and `params`


def solve_with_gradient(
    problem: Problem,
    forward: Callable[[Problem], tuple[Trajectory, Any]],
    backward: Callable[[Problem, Any, Nest, Nest], tuple[Gradients, Stats, tf.Tensor]],
) -> Trajectory:
    """Solves a problem by `forward` and computes its gradient by `backward`.

    Args:
        problem: the problem to solve.
        forward: `forward(problem)` returns the trajectory and a memory for `backward`, which counts as a constant.
        backward: `backward(problem, memory, ys, dys)` returns the gradients of `y0`, `ts` and `params` from the
            gradients `dys` of `ys`, and the stats and the status of its own solve. For a second derivative TensorFlow
            differentiates `backward`; the tensors of its `problem` and `ys` depend on the inputs of the solve.
    """
    field = problem.vector_field

    def run(y0: Nest, ts: tf.Tensor, params: list[tf.Tensor], _: Nest) -> tuple[Nest, Nest, Nest]:
        trajectory, memory = forward(problem._replace(y0=y0, ts=ts, params=params))
        return trajectory.ys, (trajectory.stats, trajectory.status, trajectory.stop), (memory, trajectory.stop)

    def run_back(
        memory: Nest,
        variables: Sequence[tf.Variable],
        y0: Nest,
        ts: tf.Tensor,
        params: list[tf.Tensor],
        backward_status: Nest,
        ys: Nest,
        dys: Nest,
    ) -> tuple[tuple, list[tf.Tensor], Nest]:
        memory, stop = memory
        reading = field.also_reading(variables)
        more = reading.params[len(params) :]
        problem_again = problem._replace(vector_field=reading, y0=y0, ts=ts, params=[*params, *more])
        if isinstance(stop, Stop):
            problem_again = problem_again._replace(ts=stop.limit(ts))
        (dy0, dts, dparams), *report = backward(problem_again, memory, ys, dys)
        if isinstance(stop, Stop):
            dts = stop.limit_gradient(ts, dts)
        return (dy0, dts, dparams[: len(params)], backward_status), dparams[len(params) :], report

    def conclude(gradients: tuple, report: Nest, dys: Nest) -> tuple:
        stats, status = report
        # A failure is excused if it comes from the loss: if the upstream gradient is not finite (a loss scaler skips
        # this step), or if it is so large that a float16 field overflows.
        excused = ~is_finite(dys, per_sample=False)
        if field.may_overflow:
            excused |= status == int(Status.NON_FINITE)
        if problem.on_backward is not None:
            problem.on_backward(stats, status, excused)
        failure = tf.where(excused, 0, status)
        adjoint, dts, dparams, backward_status = gradients
        if problem.throw:
            adjoint = check_status(failure, adjoint, "The solve of the adjoint", stats)
        worst = tf.nest.map_structure(lambda s: tf.cast(tf.reduce_max(failure), s.dtype), backward_status)
        return adjoint, dts, dparams, worst

    inputs = (problem.y0, problem.ts, problem.params, problem.backward_status)
    ys, (stats, status, stop) = custom_vjp(run, run_back, conclude, inputs, field.pure, problem.jit_compile)
    return Trajectory(ys, stats, status, stop)


def custom_vjp(
    forward: Callable[..., tuple[Nest, Nest, Nest]],
    backward: Callable[..., tuple[tuple, list[tf.Tensor], Nest]],
    conclude: Callable[[Any, Nest, Nest], tuple],
    inputs: tuple,
    pure: PureFunction,
    jit_compile: bool | tf.Tensor,
) -> tuple[Nest, Nest]:
    """Computes `forward(*inputs)`, with a gradient that `backward` computes.

    Args:
        forward: `forward(*inputs)` returns `(ys, others, memory)`: a nest of float tensors, a nest of any tensors, and
            a nest of further tensors that `backward` needs, which count as constants.
        backward: `backward(memory, variables, *inputs, ys, dys)` returns the gradients of `inputs` from the gradients
            `dys` of `ys`, the gradients of TensorFlow variables that `forward` has read by itself, and a report. For a
            second derivative TensorFlow differentiates it.
        conclude: `conclude(gradients, report, dys)` checks the report and returns the gradients.
        inputs: nests of float tensors.
        pure: the `PureFunction` that forward and backward evaluate. It knows the tensors that it closes over, and the
            call context.
        jit_compile: whether to make XLA programs of forward and backward, if they are parts of a graph.

    Returns:
        `(ys, others)`.
    """
    compiles = False if tf.executing_eagerly() else jit_compile
    structure: list[tuple[Nest, Nest]] = []
    solved: list[Nest] = []

    @tf.custom_gradient
    def differentiable(*flat: tf.Tensor) -> tuple[list[tf.Tensor], Callable]:
        arguments = tf.nest.pack_sequence_as(inputs, flat)
        ys, others, memory = _undifferentiated(forward, arguments, compiles)
        if not tf.executing_eagerly():
            ys = _without_gradient(flat, ys)
        structure.append((ys, others))

        def gradient(*upstream: tf.Tensor, variables: Sequence[tf.Variable] | None = None) -> Any:
            return pure.context.run(lambda: differentiate(upstream, variables))

        def differentiate(upstream: Sequence[tf.Tensor], variables: Sequence[tf.Variable] | None) -> Any:
            dys, _ = tf.nest.pack_sequence_as((ys, others), upstream)
            dys = tf.nest.map_structure(trees.dense, dys)
            if not solved:
                # Only forward-mode differentiation gets here before the solve has returned. It would get zeros.
                raise NotImplementedError(
                    "`tf.autodiff.ForwardAccumulator` does not work with this gradient method. Use reverse mode, or "
                    'gradient="direct", in eager mode or with the accumulator around a `tf.function`. '
                    f"Received: the field {pure.function!r}"
                )

            if compiles is not False and (variables or any(tf.is_symbolic_tensor(x) for x in pure.captured)):
                raise ValueError(
                    "With `jit_compile=True` a field that needs a gradient must not close over tensors of the graph or "
                    "TensorFlow variables: pass tensors through `args` to a field `f(t, y, args)`, make the variables "
                    'weights of a Keras layer, or use `jit_compile="auto"`. '
                    f"Received: {pure.function!r}"
                )

            def run_back(*arguments: Nest) -> tuple[tuple, list[tf.Tensor], Nest]:
                return backward(memory, variables or [], *arguments)

            again = (*arguments, *solved, dys)
            if not tf.executing_eagerly():
                # In the gradient of a loop around the solve, these are tensors of the loop's forward graph, and a tape
                # would watch them in vain.
                again = tf.nest.map_structure(tf.identity, again)
            if compiles is not False:
                results = differentiated_as(run_back, run_back, again, pure, compiles)
            else:
                results = run_back(*again)
            gradients, dvariables, report = results
            gradients = tf.nest.flatten(conclude(gradients, report, dys))
            return gradients if variables is None else (gradients, dvariables)

        return tf.nest.flatten((ys, others)), gradient

    results = differentiable(*tf.nest.flatten(inputs))
    ys, others = tf.nest.pack_sequence_as(structure[0], results)
    ys = _without_known_gradient(pure.hidden, ys)
    solved.append(ys)
    return ys, others


def poisoned(gradients: Gradients, status: tf.Tensor) -> Gradients:
    """Returns the gradients of a solve with NaN where it has failed."""
    adjoint, dts, dparams = gradients
    failed = status != int(Status.SUCCESS)
    any_failed = tf.reduce_any(failed)  # samples share parameters, and may share times
    return trees.poison(failed, adjoint), trees.poison(any_failed, dts), trees.poison(any_failed, dparams)


def differentiated_as(
    function: Callable[..., Nest],
    again: Callable[..., Nest],
    arguments: tuple,
    pure: PureFunction,
    jit_compile: bool | tf.Tensor,
) -> Nest:
    """Computes `function(*arguments)`. Its derivative is that of `again(*arguments)`.

    Args:
        function: returns a nest of tensors, and may be a computation that TensorFlow cannot differentiate.
        again: returns the same values by a computation that TensorFlow can differentiate.
        arguments: nests of float tensors.
        pure: the `PureFunction` that both evaluate.
        jit_compile: whether to make an XLA program of `function`, if it is part of a graph.
    """
    compiles = False if tf.executing_eagerly() else jit_compile
    structure: list[Nest] = []
    count = len(tf.nest.flatten(arguments))

    @tf.custom_gradient
    def differentiable(*flat: tf.Tensor) -> tuple[list[tf.Tensor], Callable]:
        results = _undifferentiated(function, tf.nest.pack_sequence_as(arguments, flat[:count]), compiles)
        structure.append(results)

        def gradient(*upstream: tf.Tensor, variables: Sequence[tf.Variable] | None = None) -> Any:
            return pure.context.run(lambda: differentiate(upstream, variables))

        def differentiate(upstream: Sequence[tf.Tensor], variables: Sequence[tf.Variable] | None) -> Any:
            def derivative(here: list[tf.Tensor], upstream: Sequence[tf.Tensor]) -> list[tf.Tensor]:
                sources = [*here, *pure.captured, *(variables or [])]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(sources)
                    outputs = tf.nest.flatten(again(*tf.nest.pack_sequence_as(arguments, here)))
                floats = [i for i, x in enumerate(outputs) if x.dtype.is_floating]
                return vjp(tape, [outputs[i] for i in floats], sources, [upstream[i] for i in floats])

            # From the same seed, XLA draws other noise than TensorFlow. So a computation with noise must be compiled
            # here too, although this reserves memory for the largest possible number of steps.
            compute = compiled(derivative) if compiles is True and pure.draws_noise else derivative
            # In the gradient of a `while_loop`, the inputs belong to the forward graph and are replaced by captures.
            # Copy them first, so that the tape watches the tensors that are really used.
            gradients = compute([tf.identity(x) for x in flat[:count]], upstream)
            return gradients if variables is None else (gradients[: len(flat)], gradients[len(flat) :])

        return tf.nest.flatten(results), gradient

    # The tensors that the function closes over are inputs here, so that they get their gradients.
    results = differentiable(*tf.nest.flatten(arguments), *pure.captured)
    return tf.nest.pack_sequence_as(structure[0], results)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as an XLA program."""
    return tf.function(function, autograph=False, jit_compile=True)


def _undifferentiated(function: Callable[..., Any], arguments: tuple, compiles: bool | tf.Tensor) -> Any:
    """Computes `function(*arguments)` hidden from tapes, because a custom gradient replaces what they would record."""
    constants = tf.nest.map_structure(tf.stop_gradient, arguments)
    if isinstance(compiles, bool):
        return (compiled(function) if compiles else function)(*constants)
    traced = tf.function(function, autograph=False)  # both branches share its trace
    return tf.cond(compiles, lambda: compiled(traced)(*constants), lambda: traced(*constants))


def _without_gradient(inputs: Sequence[tf.Tensor], ys: Nest) -> Nest:
    """Returns `ys` with the gradient NaN for `tf.vectorized_map`, which ignores custom gradients and would get zero."""
    total = tf.add_n([tf.reduce_sum(tf.cast(x, tf.float32)) for x in inputs])
    # The power zero is 1, whatever the base, and XLA knows that: it does not even compute the sum.
    nothing = tf.sqrt(total**0 - 1)
    return tf.nest.map_structure(lambda y: y + tf.cast(nothing, y.dtype), ys)


def _without_known_gradient(tensors: Sequence[tf.Tensor], ys: Nest) -> Nest:
    """Returns `ys` with the gradient NaN with respect to these tensors, because their part in `ys` is not known."""
    if not tensors:
        return ys

    @tf.custom_gradient
    def zero(*tensors: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            return [
                tf.fill(tf.shape(x), tf.constant(float("nan"), x.dtype)) * tf.cast(upstream, x.dtype) for x in tensors
            ]

        return tf.zeros(()), gradient

    nothing = zero(*tensors)
    return tf.nest.map_structure(lambda y: y + tf.cast(nothing, y.dtype), ys)
