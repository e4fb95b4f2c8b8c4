"""A solve whose gradient is a computation of our own."""

from collections.abc import Callable
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

    def run(y0, ts, params):
        trajectory, memory = forward(problem._replace(y0=y0, ts=ts, params=params))
        return trajectory.ys, (trajectory.stats, trajectory.status), memory

    def run_back(memory, y0, ts, params, ys, dys):
        gradients, *report = backward(problem._replace(y0=y0, ts=ts, params=params), memory, ys, dys)
        return gradients, report

    def conclude(gradients, report, dys):
        if not problem.throw and problem.on_backward is None:
            return gradients
        stats, status = report
        # An upstream gradient that is not finite is the loss's own affair (a loss scaler skips that step), and so is
        # one so large that a field in float16 overflows on it.
        excused = ~tf.reduce_all([tf.reduce_all(tf.math.is_finite(d)) for d in tf.nest.flatten(dys)])
        if problem.vector_field.computes_in_float16:
            excused |= status == int(Status.NON_FINITE)
        if problem.on_backward is not None:
            problem.on_backward(stats, status, excused)
        if not problem.throw:
            return gradients
        adjoint, *others = gradients
        return check_status(tf.where(excused, 0, status), adjoint, "The solve of the adjoint"), *others

    inputs = (problem.y0, problem.ts, problem.params)
    ys, (stats, status) = with_gradient(run, run_back, conclude, inputs, problem.jit_compile)
    closed_over = problem.vector_field.closed_over(problem.times[0], problem.y0)
    return Trajectory(refuse(closed_over, problem.vector_field.function, ys), stats, status)


def with_gradient(forward: Callable, backward: Callable, conclude: Callable, inputs: tuple, jit_compile: bool) -> tuple:
    """`forward(*inputs)` with a gradient by `backward`.

    Args:
        forward: `forward(*inputs)` gives `(ys, others, memory)`, nests of float tensors, of any tensors, and of what
            `backward` needs beside them, a constant of differentiation.
        backward: `backward(memory, *inputs, ys, dys)` gives the gradients of `inputs` from those of `ys`, and a report.
            Differentiated in its turn for second derivatives.
        conclude: `conclude(gradients, report, dys)` returns the gradients once it has looked at the report.
        inputs: nests of float tensors.
        jit_compile: whether forward and backward are XLA programs of their own, in a graph.

    Returns:
        `(ys, others)`.
    """
    compiles = jit_compile and not tf.executing_eagerly()
    structure, solved = [], []

    @tf.custom_gradient
    def differentiable(*flat):
        # An eager tape would otherwise record every operation, in memory that grows with their number.
        constants = tf.nest.pack_sequence_as(inputs, [tf.stop_gradient(x) for x in flat])
        ys, others, memory = (compiled(forward) if compiles else forward)(*constants)
        structure.append((ys, others))

        def gradient(*upstream, variables=None):
            dys, _ = tf.nest.pack_sequence_as((ys, others), upstream)
            # The gradient of a lookup comes as IndexedSlices, which a loop cannot carry.
            dys = tf.nest.map_structure(tf.convert_to_tensor, dys)
            if not solved:
                # Only forward mode asks before the solve has returned, and would get zeros.
                raise NotImplementedError(
                    "tf.autodiff.ForwardAccumulator cannot see through this gradient method. Use "
                    'gradient="direct" (eagerly, or with the accumulator around a `tf.function`), or reverse mode.'
                )

            def run_back(*arguments):
                return backward(memory, *arguments)

            arguments = (*tf.nest.pack_sequence_as(inputs, flat), *solved, dys)
            # What a loop in an XLA program keeps for its own gradient cannot leave the program.
            results = recomputed(compiled(run_back), run_back, arguments) if compiles else run_back(*arguments)
            gradients = tf.nest.flatten(conclude(*results, dys))
            # A TensorFlow variable in a closure: `refuse` sees to it that nobody takes `None` for an answer.
            return gradients if variables is None else (gradients, [None] * len(variables))

        return tf.nest.flatten((ys, others)), gradient

    results = differentiable(*tf.nest.flatten(inputs))
    ys, others = tf.nest.pack_sequence_as(structure[0], results)
    solved.append(ys)
    return ys, others


def recomputed(function: Callable, again: Callable, arguments: tuple) -> Any:
    """`function(*arguments)`, differentiated as `again(*arguments)`, an equal computation that can be."""
    structure = []

    @tf.custom_gradient
    def differentiable(*flat):
        results = function(*tf.nest.pack_sequence_as(arguments, [tf.stop_gradient(x) for x in flat]))
        structure.append(results)

        def gradient(*upstream, variables=None):
            # In the gradient of a loop these are tensors of another graph, in whose stead a tape sees others.
            here = [tf.identity(x) for x in flat]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(here)
                outputs = tf.nest.flatten(again(*tf.nest.pack_sequence_as(arguments, here)))
            floats = [i for i, x in enumerate(outputs) if x.dtype.is_floating]
            gradients = vjp(tape, [outputs[i] for i in floats], here, [upstream[i] for i in floats])
            return gradients if variables is None else (gradients, [None] * len(variables))

        return tf.nest.flatten(results), gradient

    results = differentiable(*tf.nest.flatten(arguments))
    return tf.nest.pack_sequence_as(structure[0], results)


def compiled(function: Callable) -> Callable:
    """The function as an XLA program of its own."""
    return tf.function(function, autograph=False, jit_compile=True)


def refuse(tensors: list[tf.Tensor], function: Any, ys: Nest) -> Nest:
    """`ys`, raising when a gradient is asked for one of these tensors, which `function` closes over."""
    if not tensors:
        return ys

    @tf.custom_gradient
    def zero(*tensors):
        def gradient(upstream):
            del upstream
            raise ValueError(
                "A gradient is asked for a tensor or a TensorFlow variable that the vector field, or a recurrent cell, "
                "closes over. This gradient method cannot see it there: pass it through `args` to a field "
                "`f(t, y, args)`, make it a "
                'weight of a Keras layer, or use gradient="direct". '
                f"Received: {function!r}"
            )

        return tf.zeros(()), gradient

    nothing = zero(*tensors)
    return tf.nest.map_structure(lambda y: y + tf.cast(nothing, y.dtype), ys)
