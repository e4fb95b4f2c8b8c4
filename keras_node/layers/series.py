"""The loop of a recurrent layer over the steps of a series, with a gradient that goes back step by step."""

import contextlib
import dataclasses
import math

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.buffers import new_buffer, stack, write
from keras_node.gradients.custom import compiled, recomputed, refuse, with_gradient
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.vjp import vjp
from keras_node.jit_compile import compiles
from keras_node.pure_function import PureFunction, RecordingScope
from keras_node.solution import check_status


class SeriesRNN(keras.layers.RNN):
    """`keras.layers.RNN` for cells that solve an ODE at every step, in a graph a program of its own.

    The loop keeps the states before every step and behind its solve. On the way back each step is differentiated from
    there: by the adjoint method without solving forwards again, and with no gradient of TensorFlow's through the loop,
    which would keep all that a step computes. With `training=False` it keeps nothing, and runs once more if a gradient
    is asked for. In training, the loop and its gradient are one XLA program each, as `jit_compile` says. With
    `gradient="direct"` TensorFlow differentiates the loop itself, and keeps it all. Eagerly, unrolled and where
    wrapped cells solve as well, the loop is Keras' own.

    A cell has `gradient`, `jit_compile`, `statistics`, `dropout_cells` and `is_nested`; `solve(y0, ts, **options)`,
    which is `odeint` of its field; and `advance(inputs, states, training, move)`, a step in which
    `move(y0, ts, **options)` gives the state behind a solve.
    """

    def inner_loop(self, sequences, initial_state, mask, training=False):
        # A solve within a wrapped cell could not raise from an XLA program, and would not be known on the way back.
        if tf.executing_eagerly() or self.unroll or self.cell.is_nested:
            return super().inner_loop(sequences, initial_state, mask, training)
        cell, x = self.cell, self._steps(sequences)
        valid = None if mask is None else self._steps(tf.cast(mask, tf.bool))
        loop = _Loop(self, x, initial_state, valid, training)
        inputs = (x, keras.tree.flatten(initial_state), loop.pure.params)
        if isinstance(cell.gradient, DirectGradient):
            ys, (carried, worst), _ = loop.forward(*inputs)
        else:
            ys, (carried, worst) = self._with_gradient(loop, inputs, training)
            ys = refuse(loop.pure.closed_over, cell, ys)
        loop.pure.assign(carried)
        output, states, outputs = check_status(worst, ys, "The solve")
        outputs = _swapped(outputs[0]) if self.return_sequences else output[:, None]
        return output, outputs, keras.tree.pack_sequence_as(initial_state, states)

    def _with_gradient(self, loop, inputs, training):
        jit_compile = compiles(self.cell.jit_compile, self.cell.gradient, training, lambda: loop.pure.trace)

        def in_training(*inputs):
            (*ys, _, _), others = with_gradient(loop.keeping, loop.backward, _conclude, inputs, jit_compile)
            return tuple(ys), others

        def in_inference(*inputs):
            return loop.forward(*inputs)[:2]

        if training is not False:
            return in_training(*inputs)
        # Nothing is kept for a gradient that is not expected. Should one be asked for, the loop runs once more.
        return recomputed(compiled(in_inference) if jit_compile else in_inference, in_training, inputs)

    def _steps(self, x):
        """`(batch, T, ...)` as `(T, batch, ...)`, in the order of processing."""
        return tf.reverse(_swapped(x), [0]) if self.go_backwards else _swapped(x)


class _Loop:
    """The loop over the steps, and the one back.

    Args:
        rnn: a `SeriesRNN`.
        x: the inputs, `(T, batch, ...)`.
        initial_state: the states before the first step.
        valid: which steps are not masked, `(T, batch)`, or `None`.
        training: handed on to the cell.

    Attributes:
        pure: a step as a `PureFunction`.
    """

    def __init__(self, rnn, x, initial_state, valid, training):
        self.rnn, self.cell = rnn, rnn.cell
        self.initial_state, self.valid, self.training = initial_state, valid, training
        self.size = x.shape[0] or tf.shape(x)[0]
        self.masks = _dropout_masks(self.cell, x[0], initial_state) if training else ()
        self.reports = _Reports(self.cell.statistics)
        self.pure = PureFunction(self._advance, x[0], keras.tree.flatten(initial_state), self.masks, ())
        output, _, moved, _ = self.pure.trace.structured_outputs
        batch = x.shape[1] or tf.shape(x)[1]
        self.no_output, *self.not_moved = [tf.zeros([batch, *a.shape[1:]], a.dtype) for a in (output, *moved)]

    def forward(self, x, states, params, keeps=False):
        """All outputs and states, what every step carried on from the one before, and how the solves ended.

        It also returns what the loop kept for a gradient, if it does: of every step the states before it, those behind
        its solves, and what was carried on to it.
        """

        def rows(output, *values):
            return [[output] if self.rnn.return_sequences else [], values if keeps else ()]

        kept = rows(self.no_output, states, self.not_moved, self.pure.carried)
        kept = tf.nest.map_structure(lambda like: new_buffer(self.size, like), kept)

        def body(i, output, before, carried, worst, kept):
            output, states, moved, status, after = self._step(i, tf.gather(x, i), output, before, params, carried)
            values = rows(output, before, moved, carried)
            kept = tf.nest.map_structure(lambda value, buffer: write(buffer, i, value), values, kept)
            return i + 1, output, states, after, tf.maximum(worst, status), kept

        start = (0, self.no_output, states, self.pure.carried, 0, kept)
        _, output, states, carried, worst, kept = tf.while_loop(
            lambda i, *_: i < self.size, body, start, maximum_iterations=self.size
        )
        outputs, kept = tf.nest.map_structure(lambda buffer: stack(buffer)[: self.size], kept)
        return (output, states, outputs), (carried, worst), kept

    def keeping(self, x, states, params):
        """The same, for a gradient."""
        ys, others, (before, moved, carries) = self.forward(x, states, params, keeps=True)
        return (*ys, before, moved), others, carries

    def backward(self, carries, x, states, params, ys, dys):
        """The gradients of the inputs, the initial states and the parameters, and how the adjoint's solves ended."""
        del states
        _, _, _, before, moved = ys
        doutput, dstates, doutputs, dbefore, dmoved = dys
        knows = hasattr(self.cell.gradient, "given")

        def at(i, nest):
            return tf.nest.map_structure(lambda a: tf.gather(a, i), nest)

        def body(i, doutput, dstates, dparams, dx, worst):
            inputs = tf.gather(x, i), tf.zeros_like(doutput), at(i, before), params
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tf.nest.flatten(inputs))
                output, states, behind, _, _ = self._step(i, *inputs, at(i, carries), at(i, moved) if knows else ())
            if doutputs:
                doutput += tf.gather(doutputs[0], i)
            self.reports.statuses.clear()  # a second derivative has left some of another graph
            cotangents = (doutput, dstates, at(i, dmoved))
            dx_i, doutput, dstates, dstep = vjp(tape, (output, states, behind), inputs, cotangents)
            dstates, dparams = trees.add(dstates, at(i, dbefore)), trees.add(dparams, dstep)
            worst = tf.reduce_max([worst, *self.reports.statuses])
            return i - 1, doutput, dstates, dparams, write(dx, i, dx_i), worst

        nothing = tf.nest.map_structure(tf.zeros_like, params)
        start = (self.size - 1, doutput, dstates, nothing, new_buffer(self.size, x[0]), 0)
        _, _, dstates, dparams, dx, worst = tf.while_loop(
            lambda i, *_: i >= 0, body, start, maximum_iterations=self.size
        )
        return (stack(dx)[: self.size], dstates, dparams), worst

    def _step(self, i, x, output, states, params, carried, known=()):
        """The output, the states, those behind solves, how these ended, and `carried`; masked, it changes nothing."""
        pure = self.pure
        results, carried = pure(params, pure.constants, carried, x, states, self.masks, known)
        new_output, new_states, moved, status = results
        new_states = [tf.ensure_shape(new, old.shape) for new, old in zip(new_states, states, strict=True)]
        if self.valid is not None:
            here = tf.gather(self.valid, i)
            new_output = trees.where(here, new_output, self.no_output if self.rnn.zero_output_for_mask else output)
            new_states = trees.where(here, new_states, states)
        return new_output, new_states, moved, status, carried

    def _advance(self, x, states, masks, known):
        """A step of the cell; `known` is the state behind each of its solves where these need not be made."""
        moved, statuses = [], []

        def move(y0, ts, **options):
            gradient = self.cell.gradient.given(known[len(moved)]) if known else self.cell.gradient
            options.update(gradient=gradient, throw=False, jit_compile=False, statistics=self.reports)
            solution = self.cell.solve(y0, ts, **options)
            moved.append(solution.ys[-1])
            statuses.append(tf.reduce_max(solution.status))
            return moved[-1]

        states = keras.tree.pack_sequence_as(self.initial_state, states)
        with _fixed(self.cell.dropout_cells, masks):
            output, states = self.cell.advance(x, states, self.training, move)
        return output, keras.tree.flatten(states), moved, tf.reduce_max(statuses)


def for_short_intervals(solver, gradient):
    """The solver of a cell: adaptive, and not told how to start, it attempts the whole interval first.

    Observations are mostly so near that one step does, where the trial of a first step and a short one to begin with
    would double the work. A step that is too long is rejected and tells how long one may be.
    """
    # TensorFlow's own gradient goes through rejected steps too: under XLA it is NaN if one has left the field's domain.
    if not solver.adaptive or solver.first_step is not None or isinstance(gradient, DirectGradient):
        return solver
    return dataclasses.replace(solver, first_step=math.inf)


def _conclude(gradients, worst, dys):
    del dys
    return check_status(worst, gradients, "The solve of the adjoint")


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
    if not any(getattr(c, "dropout", 0) or getattr(c, "recurrent_dropout", 0) for c in cells):
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
