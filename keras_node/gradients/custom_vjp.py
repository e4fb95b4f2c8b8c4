"""Computations whose gradient is a computation of our own.

How a solve and its gradient are computed depends on where they are:

- Eagerly both run as Python goes along. A tape records nothing of the solve but the call of `custom_vjp`.
- In a graph both are parts of it. With `jit_compile`, each is an XLA program, a `tf.function` in the graph.
- Where the whole graph is compiled by XLA, they are parts of that program.
- A second derivative differentiates the gradient's own computation. What a loop in an XLA program keeps for its
  gradient cannot leave the program, so there `differentiated_as` computes the gradient again outside of it.

`tf.vectorized_map` drops custom gradients and differentiates what is inside. That is closed to it, and the gradient is
NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_node.gradients.vjp import vjp
from keras_node.solution import Stats, Status, check_status
from keras_node.solve import Problem, Trajectory
from keras_node.trees import Nest


def solve_with_gradient(
    problem: Problem,
    forward: Callable[[Problem], tuple[Trajectory, Any]],
    backward: Callable[[Problem, Any, Nest, Nest], tuple[tuple[Nest, tf.Tensor, list[tf.Tensor]], Stats, tf.Tensor]],
) -> Trajectory:
    """Solves by `forward`, with a gradient by `backward`.

    Args:
        problem: what to solve.
        forward: `forward(problem)` gives the trajectory and a memory for `backward`, constants of differentiation.
        backward: `backward(problem, memory, ys, dys)` gives the gradients of `y0`, `ts` and `params` from those of
            `ys`, and the stats and the status of what it solved for them. It is differentiated in its turn for second
            derivatives: the tensors of `problem` and `ys` are connected to what the solve came from.
    """
    field = problem.vector_field

    def run(y0, ts, params):
        trajectory, memory = forward(problem._replace(y0=y0, ts=ts, params=params))
        return trajectory.ys, (trajectory.stats, trajectory.status), memory

    def run_back(memory, variables, y0, ts, params, ys, dys):
        reading = field.also_reading(variables)
        more = reading.params[len(params) :]
        problem_again = problem._replace(vector_field=reading, y0=y0, ts=ts, params=[*params, *more])
        (dy0, dts, dparams), *report = backward(problem_again, memory, ys, dys)
        return (dy0, dts, dparams[: len(params)]), dparams[len(params) :], report

    def conclude(gradients, report, dys):
        if not problem.throw and problem.on_backward is None:
            return gradients
        stats, status = report
        # An upstream gradient that is not finite is the loss's own affair (a loss scaler skips that step), and so is
        # one so large that a field in float16 overflows on it.
        excused = ~tf.reduce_all([tf.reduce_all(tf.math.is_finite(d)) for d in tf.nest.flatten(dys)])
        if field.precision == tf.float16:
            excused |= status == int(Status.NON_FINITE)
        if problem.on_backward is not None:
            problem.on_backward(stats, status, excused)
        if not problem.throw:
            return gradients
        adjoint, *others = gradients
        return check_status(tf.where(excused, 0, status), adjoint, "The solve of the adjoint"), *others

    inputs = (problem.y0, problem.ts, problem.params)
    ys, (stats, status) = custom_vjp(run, run_back, conclude, inputs, field.pure, problem.jit_compile)
    return Trajectory(ys, stats, status)


def custom_vjp(
    forward: Callable, backward: Callable, conclude: Callable, inputs: tuple, pure: Any, jit_compile: bool
) -> tuple:
    """`forward(*inputs)` with a gradient by `backward`.

    Args:
        forward: `forward(*inputs)` gives `(ys, others, memory)`, nests of float tensors, of any tensors, and of what
            `backward` needs beside them, a constant of differentiation.
        backward: `backward(memory, variables, *inputs, ys, dys)` gives the gradients of `inputs` from those of `ys`,
            those of TensorFlow variables that `forward` has read by itself, and a report. It is differentiated in its
            turn for second derivatives.
        conclude: `conclude(gradients, report, dys)` returns the gradients once it has looked at the report.
        inputs: nests of float tensors.
        pure: the `PureFunction` that forward and backward evaluate: what it closes over, and in which call context.
        jit_compile: whether forward and backward are XLA programs, where they are parts of a graph.

    Returns:
        `(ys, others)`.
    """
    compiles = jit_compile and not tf.executing_eagerly()
    structure, solved = [], []

    @tf.custom_gradient
    def differentiable(*flat):
        arguments = tf.nest.pack_sequence_as(inputs, flat)
        ys, others, memory = _undifferentiated(forward, arguments, compiles)
        if not tf.executing_eagerly():
            ys = _without_gradient(flat, ys)
        structure.append((ys, others))

        def gradient(*upstream, variables=None):
            return pure.context.run(lambda: differentiate(upstream, variables))

        def differentiate(upstream, variables):
            dys, _ = tf.nest.pack_sequence_as((ys, others), upstream)
            # The gradient of a lookup comes as IndexedSlices, which a loop cannot carry.
            dys = tf.nest.map_structure(tf.convert_to_tensor, dys)
            if not solved:
                # Only forward mode asks before the solve has returned, and would get zeros.
                raise NotImplementedError(
                    "tf.autodiff.ForwardAccumulator cannot see through this gradient method. Use "
                    'gradient="direct" (eagerly, or with the accumulator around a `tf.function`), or reverse mode.'
                )

            if compiles and (variables or any(tf.is_symbolic_tensor(x) for x in pure.captured)):
                raise ValueError(
                    "With `jit_compile=True` a gradient needs a field that closes over no tensor of the graph and no "
                    "TensorFlow variable: pass tensors through `args` to a field `f(t, y, args)`, make variables "
                    'weights of a Keras layer, or leave `jit_compile="auto"`. '
                    f"Received: {pure.function!r}"
                )

            def run_back(*arguments):
                return backward(memory, variables or [], *arguments)

            again = (*arguments, *solved, dys)
            if compiles:
                results = differentiated_as(run_back, run_back, again, pure, jit_compile=True)
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


def differentiated_as(function: Callable, again: Callable, arguments: tuple, pure: Any, jit_compile: bool) -> Any:
    """`function(*arguments)`, differentiated as `again(*arguments)`, an equal computation that can be.

    Args:
        function: gives a nest of tensors.
        again: gives the same.
        arguments: nests of float tensors.
        pure: the `PureFunction` that both evaluate.
        jit_compile: whether `function` is an XLA program, where it is part of a graph.
    """
    compiles = jit_compile and not tf.executing_eagerly()
    structure, count = [], len(tf.nest.flatten(arguments))

    @tf.custom_gradient
    def differentiable(*flat):
        results = _undifferentiated(function, tf.nest.pack_sequence_as(arguments, flat[:count]), compiles)
        structure.append(results)

        def gradient(*upstream, variables=None):
            return pure.context.run(lambda: differentiate(upstream, variables))

        def differentiate(upstream, variables):
            def derivative(here, upstream):
                sources = [*here, *pure.captured, *(variables or [])]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(sources)
                    outputs = tf.nest.flatten(again(*tf.nest.pack_sequence_as(arguments, here)))
                floats = [i for i, x in enumerate(outputs) if x.dtype.is_floating]
                return vjp(tape, [outputs[i] for i in floats], sources, [upstream[i] for i in floats])

            # From one seed XLA draws other noise than TensorFlow does. So a computation with noise must be compiled
            # again, at the price of memory for as many steps as there may be.
            compute = compiled(derivative) if compiles and pure.draws_noise else derivative
            # In the gradient of a `while_loop` the inputs belong to the forward graph and are replaced by captures.
            # Copy them first, so that the tape watches the tensors that are used.
            gradients = compute([tf.identity(x) for x in flat[:count]], upstream)
            return gradients if variables is None else (gradients[: len(flat)], gradients[len(flat) :])

        return tf.nest.flatten(results), gradient

    # What the function closes over has its gradient here, though it is read inside.
    results = differentiable(*tf.nest.flatten(arguments), *pure.captured)
    return tf.nest.pack_sequence_as(structure[0], results)


def compiled(function: Callable) -> Callable:
    """The function as an XLA program."""
    return tf.function(function, autograph=False, jit_compile=True)


def _undifferentiated(function, arguments, compiles):
    """`function(*arguments)`, of which a tape does not record what a custom gradient makes superfluous."""
    constants = tf.nest.map_structure(tf.stop_gradient, arguments)
    return (compiled(function) if compiles else function)(*constants)


def _without_gradient(inputs: Sequence[tf.Tensor], ys: Nest) -> Nest:
    """`ys`, whose gradient is NaN for `tf.vectorized_map`, which drops our own; without this it would be zero."""
    total = tf.add_n([tf.reduce_sum(tf.cast(x, tf.float32)) for x in inputs])
    nothing = tf.sqrt(0 * tf.where(tf.math.is_finite(total), total, 0))
    return tf.nest.map_structure(lambda y: y + tf.cast(nothing, y.dtype), ys)


def _without_known_gradient(tensors: Sequence[tf.Tensor], ys: Nest) -> Nest:
    """`ys`, whose gradient with respect to these tensors is NaN: they have a part in it, and nobody knows which."""
    if not tensors:
        return ys

    @tf.custom_gradient
    def zero(*tensors):
        def gradient(upstream):
            return [
                tf.fill(tf.shape(x), tf.constant(float("nan"), x.dtype)) * tf.cast(upstream, x.dtype) for x in tensors
            ]

        return tf.zeros(()), gradient

    nothing = zero(*tensors)
    return tf.nest.map_structure(lambda y: y + tf.cast(nothing, y.dtype), ys)
