"""A loop over the steps of a series, and the loop backward that computes its gradient.

The forward loop keeps the states before every step and after the solves of the step. The backward loop differentiates
each step from these states. So the adjoint method need not solve forward again, and TensorFlow's gradient of a loop,
which would keep everything that a step computes, is not used.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_node import trees
from keras_node.buffers import Buffer, new_buffer, stack, write
from keras_node.pure_function import PureFunction
from keras_node.trees import Nest
from keras_node.vjp import vjp


class Scan:
    """The loop over the steps of a series, in a graph.

    Args:
        step: a `PureFunction`. `step(x, states, solved, backward_statuses, constants)` returns `(output, states, moved,
            status)`, where `moved` are the states after each of its solves, and `status` is the worst status of these
            solves. In the forward loop `solved` is `None`: the loop has a gradient as a whole, so its solves need none.
            In the backward loop `solved` is `moved`, and the step need not solve again, or it is empty; and
            `backward_statuses` holds the `backward_status` of each `Problem` that the step solves.
        x: the inputs, `(T, batch, ...)`.
        constants: a nest of tensors that is passed to every step and needs no gradient.
        valid: which steps are not masked, `(T, batch)`, or `None`. A masked step changes nothing.
        keeps_outputs: whether to return all outputs, or only the last one.
        zero_output: whether the output of a masked step is zero. Otherwise it is the output of the step before.
        knows_solutions: whether to pass `solved` to a step for its gradient.
        exported: whether an exported model may contain the forward loop (see `new_buffer`).
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
        exported: bool,
    ) -> None:
        self.step = step
        self.constants = constants
        self.valid = valid
        self.size = x.shape[0] or tf.shape(x)[0]
        self.keeps_outputs = keeps_outputs
        self.zero_output = zero_output
        self.knows_solutions = knows_solutions
        self.exported = exported
        assert step.trace is not None  # a `Scan` is only made in a graph
        (output, _, moved, _), _ = step.trace.structured_outputs
        batch = x.shape[1] or tf.shape(x)[1]
        self.no_output, *self.not_moved = [tf.zeros([batch, *a.shape[1:]], a.dtype) for a in (output, *moved)]

    def forward(
        self, x: tf.Tensor, states: list[tf.Tensor], params: list[tf.Tensor], keeps: bool = False
    ) -> tuple[Nest, Nest, Nest]:
        """Runs the steps.

        Returns:
            `(output, states, outputs)`, the last output and states and the list of all outputs, which is empty unless
            they are wanted; `(carried, status)`, the last values of `step.carried` and the worst status of a solve; and
            what a gradient needs: for every step the states before it, the states after its solves, and the values of
            `step.carried` before it. This is empty unless `keeps` is true.
        """

        def rows(output: tf.Tensor, *values: Nest) -> list[Nest]:
            return [[output] if self.keeps_outputs else [], values if keeps else ()]

        kept = rows(self.no_output, states, self.not_moved, self.step.carried)
        kept = tf.nest.map_structure(lambda like: new_buffer(self.size, like, self.exported), kept)

        def body(i: tf.Tensor, output: tf.Tensor, before: Nest, carried: Nest, worst: tf.Tensor, kept: Nest) -> tuple:
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

    def keeping(
        self, x: tf.Tensor, states: list[tf.Tensor], params: list[tf.Tensor]
    ) -> tuple[tuple, Nest, list[tf.Tensor]]:
        """Runs the steps and keeps what a gradient needs: `forward` for `custom_vjp`."""
        ys, others, (before, moved, carries) = self.forward(x, states, params, keeps=True)
        return (*ys, before, moved), others, carries

    def backward(
        self,
        carries: list[tf.Tensor],
        variables: Sequence[tf.Variable],
        x: tf.Tensor,
        states: list[tf.Tensor],
        params: list[tf.Tensor],
        ys: Nest,
        dys: Nest,
    ) -> tuple[tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]], list[tf.Tensor], tf.Tensor]:
        """Computes the gradients from the last step to the first: `backward` for `custom_vjp`.

        Returns:
            The gradients of the inputs, the initial states and the parameters; the gradients of TensorFlow variables
            that a step reads by itself; and the worst status of the solves of the adjoint.
        """
        del states
        step, count = self.step.also_reading(variables), len(params)
        params = [*params, *step.params[count:]]
        sources = step.sources(params)
        _, _, _, before, moved = ys
        doutput, dstates, doutputs, dbefore, dmoved = dys

        def at(i: tf.Tensor, nest: Nest) -> Nest:
            return tf.nest.map_structure(lambda a: tf.gather(a, i), nest)

        def body(i: tf.Tensor, doutput: tf.Tensor, dstates: Nest, dparams: Nest, dx: Buffer, worst: tf.Tensor) -> tuple:
            inputs = tf.gather(x, i), tf.zeros_like(doutput), at(i, before), params
            statuses = [tf.zeros(()) for _ in moved]  # their gradients are the statuses of the solves of the adjoint
            watched = (*inputs[:-1], sources, statuses)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tf.nest.flatten(watched))
                solved = at(i, moved) if self.knows_solutions else ()
                output, states, after, _, _ = self._advance(step, i, *inputs, at(i, carries), solved, statuses)
            if doutputs:
                doutput += tf.gather(doutputs[0], i)
            cotangents = (doutput, dstates, at(i, dmoved))
            dx_i, doutput, dstates, dstep, failures = vjp(tape, (output, states, after), watched, cotangents)
            dstates, dparams = trees.add(dstates, at(i, dbefore)), trees.add(dparams, dstep)
            worst = tf.reduce_max([worst, *(tf.cast(failure, tf.int32) for failure in failures)])
            return i - 1, doutput, dstates, dparams, write(dx, i, dx_i), worst

        nothing = tf.nest.map_structure(tf.zeros_like, params)
        start = (self.size - 1, doutput, dstates, nothing, new_buffer(self.size, x[0], exported=False), 0)
        _, _, dstates, dparams, dx, worst = tf.while_loop(
            lambda i, *_: i >= 0, body, start, maximum_iterations=self.size
        )
        return (stack(dx)[: self.size], dstates, dparams[:count]), dparams[count:], worst

    def _advance(
        self,
        step: PureFunction,
        i: tf.Tensor,
        x: tf.Tensor,
        output: tf.Tensor,
        states: list[tf.Tensor],
        params: list[tf.Tensor],
        carried: list[tf.Tensor],
        solved: Nest = None,
        backward_statuses: Sequence[tf.Tensor] = (),
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor], tf.Tensor, list[tf.Tensor]]:
        """Does step `i`, which keeps the output and the states of masked samples.

        Returns:
            The output, the states, the states after the solves, the status of the solves, and `carried`.
        """
        inputs = (x, states, solved, backward_statuses, self.constants)
        (new_output, new_states, moved, status), carried = step(params, carried, *inputs)
        new_states = [tf.ensure_shape(new, old.shape) for new, old in zip(new_states, states, strict=True)]
        if self.valid is not None:
            here = tf.gather(self.valid, i)
            new_output = trees.where(here, new_output, self.no_output if self.zero_output else output)
            new_states = trees.where(here, new_states, states)
        return new_output, new_states, moved, status, carried
