"""The loop of a recurrent layer over the steps of a series, with a gradient that goes back step by step."""

import contextlib

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, stack, write
from keras_node.gradients.custom import refuse, with_gradient
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.vjp import vjp
from keras_node.jit_compile import compiles
from keras_node.pure_function import PureFunction, RecordingScope
from keras_node.solution import check_status


class SeriesRNN(keras.layers.RNN):
    """`keras.layers.RNN` for cells that solve an ODE at every step, in a graph a program of its own.

    The loop keeps the states before every step and behind its solve. On the way back each step is differentiated from
    there: by the adjoint method without solving forwards again, and with no gradient of TensorFlow's through the loop,
    which would keep all that a step computes. In training, the loop and its gradient are one XLA program each. With
    `gradient="direct"` TensorFlow differentiates it all the same. Eagerly and unrolled the loop is Keras' own.

    A cell has `gradient`, `jit_compile`, `statistics`, `dropout_cells`; `solve(y0, ts, **options)`, which is `odeint`
    with its field and options; and `advance(inputs, states, training, move)`, a step in which `move(y0, ts, **options)`
    gives the state behind a solve.
    """

    def inner_loop(self, sequences, initial_state, mask, training=False):
        cell = self.cell
        if tf.executing_eagerly() or self.unroll:
            return super().inner_loop(sequences, initial_state, mask, training)
        x = self._steps(sequences)
        valid = () if mask is None else self._steps(tf.cast(mask, tf.bool))
        states = keras.tree.flatten(initial_state)
        masks = _dropout_masks(cell, x[0], initial_state) if training else ()
        reports = _Reports(cell.statistics)

        def advance(x, states, masks, known):
            """The output and the states of a step, the states behind its solves, and how these ended."""
            moved, statuses = [], []

            def move(y0, ts, **options):
                gradient = cell.gradient.given(known[len(moved)]) if known else cell.gradient
                solution = cell.solve(
                    y0, ts, gradient=gradient, throw=False, jit_compile=False, statistics=reports, **options
                )
                moved.append(solution.ys[-1])
                statuses.append(tf.reduce_max(solution.status))
                return moved[-1]

            states = keras.tree.pack_sequence_as(initial_state, states)
            with _fixed(cell.dropout_cells, masks):
                output, states = cell.advance(x, states, training, move)
            return output, keras.tree.flatten(states), moved, tf.reduce_max(statuses)

        pure = PureFunction(advance, x[0], states, masks, ())
        output_spec, _, moved_specs, _ = pure.trace.structured_outputs
        blank = [tf.zeros(_shape_like(spec, x[0]), spec.dtype) for spec in (output_spec, *moved_specs)]

        def step(i, x, output, states, params, carried, known=()):
            """A step, which changes nothing where it is masked."""
            results, carried = pure(params, pure.constants, carried, x, states, masks, known)
            new_output, new_states, moved, status = results
            if mask is not None:
                here = tf.gather(valid, i)
                new_output = trees.where(here, new_output, blank[0] if self.zero_output_for_mask else output)
                new_states = trees.where(here, new_states, states)
            return new_output, new_states, moved, status, carried

        def forward(x, states, params):
            size = x.shape[0] or tf.shape(x)[0]
            kept = [states, blank[1:], pure.carried, blank[:1] if self.return_sequences else []]
            kept = tf.nest.map_structure(lambda like: new_buffer(size, like), kept)

            def body(i, output, before, carried, worst, kept):
                output, states, moved, status, after = step(i, tf.gather(x, i), output, before, params, carried)
                values = [before, moved, carried, [output] if self.return_sequences else []]
                kept = tf.nest.map_structure(lambda value, buffer: write(buffer, i, value), values, kept)
                return i + 1, output, states, after, tf.maximum(worst, status), kept

            _, output, states, carried, worst, kept = tf.while_loop(
                lambda i, *_: i < size, body, (0, blank[0], states, pure.carried, 0, kept), maximum_iterations=size
            )
            before, moved, noise, outputs = tf.nest.map_structure(stack, kept)
            return (output, states, outputs, before, moved), (carried, worst), noise

        def backward(noise, x, states, params, ys, dys):
            _, _, _, before, moved = ys
            doutput, dstates, doutputs, dbefore, dmoved = dys
            at = lambda i, nest: tf.nest.map_structure(lambda a: tf.gather(a, i), nest)  # noqa: E731

            def body(i, doutput, dstates, dparams, dx, worst):
                x_i, states_i, output_i = tf.gather(x, i), at(i, before), tf.zeros_like(doutput)
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch([x_i, output_i, *states_i, *params])
                    known = at(i, moved) if hasattr(cell.gradient, "given") else ()
                    output, after, behind, _, _ = step(i, x_i, output_i, states_i, params, at(i, noise), known)
                if doutputs:
                    doutput += tf.gather(doutputs[0], i)
                inputs, cotangents = (x_i, output_i, states_i, params), (doutput, dstates, at(i, dmoved))
                reports.statuses.clear()  # a second derivative has left some of another graph
                dx_i, doutput, dstates, dstep = vjp(tape, (output, after, behind), inputs, cotangents)
                dstates, dparams = trees.add(dstates, at(i, dbefore)), trees.add(dparams, dstep)
                return i - 1, doutput, dstates, dparams, write(dx, i, dx_i), tf.reduce_max([worst, *reports.statuses])

            size = x.shape[0] or tf.shape(x)[0]
            start = (size - 1, doutput, dstates, [tf.zeros_like(p) for p in params], new_buffer(size, x[0]), 0)
            _, _, dstates, dparams, dx, worst = tf.while_loop(
                lambda i, *_: i >= 0, body, start, maximum_iterations=size
            )
            return (stack(dx), dstates, dparams), worst

        def conclude(gradients, worst, dys):
            del dys
            return check_status(worst, gradients, "The solve of the adjoint")

        inputs = (x, states, pure.params)
        if isinstance(cell.gradient, DirectGradient):
            ys, (carried, worst), _ = forward(*inputs)
        else:
            jit_compile = compiles(cell.jit_compile, cell.gradient, training, lambda: pure.trace)
            ys, (carried, worst) = with_gradient(forward, backward, conclude, inputs, jit_compile)
            ys = refuse(pure.closed_over, cell, ys)
        pure.assign(carried)
        output, states, outputs, _, _ = check_status(worst, ys, "The solve")
        outputs = _swapped(outputs[0]) if self.return_sequences else output[:, None]
        return output, outputs, keras.tree.pack_sequence_as(initial_state, states)

    def _steps(self, x):
        """`(batch, T, ...)` as `(T, batch, ...)`, in the order of processing."""
        return tf.reverse(_swapped(x), [0]) if self.go_backwards else _swapped(x)


class _Reports:
    """Passes what solves report on to the statistics of a layer, and keeps how the adjoint's ended."""

    def __init__(self, statistics):
        self.statistics = statistics
        self.statuses = []

    def forward(self, stats, status, training):
        if self.statistics is not None:
            self.statistics.forward(stats, status, training)

    def backward(self, stats, status, excused, training):
        del stats, training
        self.statuses.append(tf.reduce_max(tf.where(excused, 0, status)))


def _dropout_masks(cell, x, states):
    """The masks of a series, drawn by a step that solves nothing."""
    cells = cell.dropout_cells
    if not any(c.dropout or c.recurrent_dropout for c in cells):
        return ()
    scope = RecordingScope()
    with scope:
        cell.advance(x, states, True, lambda y0, ts, **options: y0)
    for variable, value in scope.updates:
        if tf.as_dtype(variable.dtype).is_integer:
            variable.assign(value)
    masks = [(c.get_dropout_mask(None), c.get_recurrent_dropout_mask(None)) for c in cells]
    return [tuple(() if mask is None else mask for mask in pair) for pair in masks]


@contextlib.contextmanager
def _fixed(cells, masks):
    """Gives cells their dropout masks, if any: on the way back a layer has forgotten those that it drew."""
    for cell, pair in zip(cells, masks, strict=False):
        mask, recurrent_mask = (None if isinstance(m, tuple) else m for m in pair)
        cell.get_dropout_mask = lambda _, mask=mask: mask
        cell.get_recurrent_dropout_mask = lambda _, mask=recurrent_mask: mask
    try:
        yield
    finally:
        for cell, _ in zip(cells, masks, strict=False):
            del cell.get_dropout_mask, cell.get_recurrent_dropout_mask


def _swapped(x):
    """A tensor with its first two axes exchanged."""
    return tf.transpose(x, [1, 0, *range(2, x.shape.rank)])


def _shape_like(spec, x):
    """The shape of a spec, with the batch of `x`."""
    return [x.shape[0] or tf.shape(x)[0], *spec.shape[1:]]
