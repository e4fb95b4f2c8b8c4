"""A loop over the steps of a series, and its reverse: the gradient goes back step by step.

The loop keeps the states before every step and after its solves. Its reverse differentiates each step from there: by
the adjoint method without solving forward again, and without TensorFlow's gradient of a loop, which would keep
everything that a step computes.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, stack, write
from keras_node.gradients.vjp import vjp
from keras_node.pure_function import PureFunction
from keras_node.trees import Nest


class Scan:
    """The loop over the steps of a series.

    Args:
        step: as a `PureFunction`, `step(x, states, solved, constants)` returns `(output, states, moved, status)`:
            `moved` are the states after each of its solves, and `status` the worst status of these. If `solved` is not
            empty, it holds `moved`, and the step needs not solve again.
        x: the inputs, `(T, batch, ...)`.
        constants: a nest of tensors that every step is given, and that no gradient is asked for.
        valid: which steps are not masked, `(T, batch)`, or `None`. A masked step changes nothing.
        keeps_outputs: whether all outputs are wanted, or the last one.
        zero_output: whether the output of a masked step is zero, or that of the step before.
        knows_solutions: whether the gradient of a step can do with `solved`.
        backward_statuses: a list to which the gradients of a step's solves append their status.
    """

    def __init__(
        self,
        step: PureFunction,
        x: tf.Tensor,
        constants: Nest,
        valid: tf.Tensor | None,
        *,
        keeps_outputs: bool,
        zero_output: bool,
        knows_solutions: bool,
        backward_statuses: list,
    ):
        self.step = step
        self.constants = constants
        self.valid = valid
        self.size = x.shape[0] or tf.shape(x)[0]
        self.keeps_outputs = keeps_outputs
        self.zero_output = zero_output
        self.knows_solutions = knows_solutions
        self.backward_statuses = backward_statuses
        (output, _, moved, _), _ = step.trace.structured_outputs
        batch = x.shape[1] or tf.shape(x)[1]
        self.no_output, *self.not_moved = [tf.zeros([batch, *a.shape[1:]], a.dtype) for a in (output, *moved)]

    def forward(self, x: tf.Tensor, states: list, params: list, keeps: bool = False) -> tuple:
        """All outputs and states, what every step carried on from the one before, and how the solves ended.

        It also returns what the loop kept for a gradient, if it does: of every step the states before it, those after
        its solves, and what was carried on to it.
        """

        def rows(output, *values):
            return [[output] if self.keeps_outputs else [], values if keeps else ()]

        kept = rows(self.no_output, states, self.not_moved, self.step.carried)
        kept = tf.nest.map_structure(lambda like: new_buffer(self.size, like), kept)

        def body(i, output, before, carried, worst, kept):
            inputs = tf.gather(x, i), output, before, params
            output, states, moved, status, after = self._advance(self.step, i, *inputs, carried)
            values = rows(output, before, moved, carried)
            kept = tf.nest.map_structure(lambda value, buffer: write(buffer, i, value), values, kept)
            return i + 1, output, states, after, tf.maximum(worst, status), kept

        start = (0, self.no_output, states, self.step.carried, 0, kept)
        _, output, states, carried, worst, kept = tf.while_loop(
            lambda i, *_: i < self.size, body, start, maximum_iterations=self.size
        )
        outputs, kept = tf.nest.map_structure(lambda buffer: stack(buffer)[: self.size], kept)
        return (output, states, outputs), (carried, worst), kept

    def keeping(self, x: tf.Tensor, states: list, params: list) -> tuple:
        """The same, for a gradient."""
        ys, others, (before, moved, carries) = self.forward(x, states, params, keeps=True)
        return (*ys, before, moved), others, carries

    def backward(self, carries: list, variables: list, x: tf.Tensor, states: list, params: list, ys: Any, dys: Any):
        """The gradients of the inputs, the initial states and the parameters, and how the adjoint's solves ended.

        Between the two, the gradients of TensorFlow variables that a step reads by itself.
        """
        del states
        step, count = self.step.also_reading(variables), len(params)
        params = [*params, *step.params[count:]]
        sources = step.sources(params)
        _, _, _, before, moved = ys
        doutput, dstates, doutputs, dbefore, dmoved = dys

        def at(i, nest):
            return tf.nest.map_structure(lambda a: tf.gather(a, i), nest)

        def body(i, doutput, dstates, dparams, dx, worst):
            inputs = tf.gather(x, i), tf.zeros_like(doutput), at(i, before), params
            watched = (*inputs[:-1], sources)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tf.nest.flatten(watched))
                solved = at(i, moved) if self.knows_solutions else ()
                output, states, after, _, _ = self._advance(step, i, *inputs, at(i, carries), solved)
            if doutputs:
                doutput += tf.gather(doutputs[0], i)
            self.backward_statuses.clear()  # a second derivative has left some of another graph
            cotangents = (doutput, dstates, at(i, dmoved))
            dx_i, doutput, dstates, dstep = vjp(tape, (output, states, after), watched, cotangents)
            dstates, dparams = trees.add(dstates, at(i, dbefore)), trees.add(dparams, dstep)
            worst = tf.reduce_max([worst, *self.backward_statuses])
            return i - 1, doutput, dstates, dparams, write(dx, i, dx_i), worst

        nothing = tf.nest.map_structure(tf.zeros_like, params)
        start = (self.size - 1, doutput, dstates, nothing, new_buffer(self.size, x[0]), 0)
        _, _, dstates, dparams, dx, worst = tf.while_loop(
            lambda i, *_: i >= 0, body, start, maximum_iterations=self.size
        )
        return (stack(dx)[: self.size], dstates, dparams[:count]), dparams[count:], worst

    def _advance(self, step: Callable, i, x, output, states, params, carried, solved=()):
        """The output, the states, those after solves, how these ended, and `carried`; masked, it changes nothing."""
        (new_output, new_states, moved, status), carried = step(params, carried, x, states, solved, self.constants)
        new_states = [tf.ensure_shape(new, old.shape) for new, old in zip(new_states, states, strict=True)]
        if self.valid is not None:
            here = tf.gather(self.valid, i)
            new_output = trees.where(here, new_output, self.no_output if self.zero_output else output)
            new_states = trees.where(here, new_states, states)
        return new_output, new_states, moved, status, carried
