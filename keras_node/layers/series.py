"""The recurrent layer of cells that solve an ODE at every step."""

import contextlib
import dataclasses
import math

import keras
import tensorflow as tf

from keras_node.gradients.custom_vjp import custom_vjp, differentiated_as
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.scan import Scan
from keras_node.jit_compile import compiles
from keras_node.pure_function import PureFunction, RecordingScope, is_seed
from keras_node.solution import check_status


class SeriesRNN(keras.layers.RNN):
    """`keras.layers.RNN` for cells that solve an ODE at every step; in a graph its loop is a `Scan`.

    With `training=False` the loop keeps nothing for a gradient, and runs once more if one is asked for. In training,
    the loop and its gradient are one XLA program each, as `jit_compile` says. With `gradient="direct"` TensorFlow
    differentiates the loop itself, and keeps all that a step computes. Eagerly, unrolled and where wrapped cells solve
    as well, the loop is Keras' own.

    A cell has `gradient`, `jit_compile`, `statistics`, `dropout_cells` and `is_nested`; `solve(y0, ts, **options)`,
    which is `odeint` of its field; and `advance(inputs, states, training, move)`, a step in which
    `move(y0, ts, **options)` gives the state after a solve.
    """

    def inner_loop(self, sequences, initial_state, mask, training=False):
        # A solve within a wrapped cell could not raise from an XLA program, and its gradient could not be told of it.
        if tf.executing_eagerly() or self.unroll or self.cell.is_nested:
            return super().inner_loop(sequences, initial_state, mask, training)
        cell, x = self.cell, self._steps(sequences)
        states = keras.tree.flatten(initial_state)
        # Dropout has one mask for the whole series.
        masks = _dropout_masks(cell, x[0], initial_state) if training else ()
        reports = _Reports(cell.statistics)
        scan = Scan(
            self._step(x[0], initial_state, masks, training, reports),
            x,
            masks,
            None if mask is None else self._steps(tf.cast(mask, tf.bool)),
            keeps_outputs=self.return_sequences,
            zero_output=self.zero_output_for_mask,
            knows_solutions=hasattr(cell.gradient, "given"),
            backward_statuses=reports.statuses,
        )
        inputs = (x, states, scan.step.params)
        if isinstance(cell.gradient, DirectGradient):
            ys, (carried, worst), _ = scan.forward(*inputs)
        else:
            ys, (carried, worst) = self._with_gradient(scan, inputs, training)
        scan.step.assign(carried)
        output, states, outputs = check_status(worst, ys, "The solve")
        outputs = _swapped(outputs[0]) if self.return_sequences else output[:, None]
        return output, outputs, keras.tree.pack_sequence_as(initial_state, states)

    def _with_gradient(self, scan, inputs, training):
        step = scan.step
        jit_compile = compiles(self.cell.jit_compile, self.cell.gradient, training, step)

        def in_training(*inputs):
            (*ys, _, _), others = custom_vjp(scan.keeping, scan.backward, _conclude, inputs, step, jit_compile)
            return tuple(ys), others

        def in_inference(*inputs):
            return scan.forward(*inputs)[:2]

        if training is not False:
            return in_training(*inputs)
        # Nothing is kept for a gradient that is not expected. Should one be asked for, the loop runs once more.
        return differentiated_as(in_inference, in_training, inputs, step, jit_compile)

    def _step(self, x, initial_state, masks, training, reports):
        """A step of the cell as a `PureFunction`, for a `Scan`."""
        cell = self.cell

        def step(x, states, solved, masks):
            moved, statuses = [], []

            def move(y0, ts, **options):
                gradient = cell.gradient.given(solved[len(moved)]) if solved else cell.gradient
                options.update(gradient=gradient, throw=False, jit_compile=False, statistics=reports)
                solution = cell.solve(y0, ts, **options)
                moved.append(solution.ys[-1])
                statuses.append(tf.reduce_max(solution.status))
                return moved[-1]

            states = keras.tree.pack_sequence_as(initial_state, states)
            with _fixed(cell.dropout_cells, masks):
                output, states = cell.advance(x, states, training, move)
            return output, keras.tree.flatten(states), moved, tf.reduce_max(statuses)

        pure = PureFunction(step, x, keras.tree.flatten(initial_state), (), masks)
        if pure.losses:
            raise ValueError(
                "A step of a recurrent layer cannot add losses: activity regularizers and `add_loss` have no effect in "
                "the loop over a series. Regularize the layer's output, or its weights. "
                f"Received: {len(pure.losses)} loss(es) a step"
            )
        return pure

    def _steps(self, x):
        """`(batch, T, ...)` as `(T, batch, ...)`, in the order of processing."""
        return tf.reverse(_swapped(x), [0]) if self.go_backwards else _swapped(x)


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
    """Passes what solves report on to the statistics of a layer, and keeps how the adjoint's ended.

    A gradient returns nothing but gradients. So the status of an adjoint's solve comes by way of a list, which is read
    in the same graph right after that solve.
    """

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
        if is_seed(variable):
            variable.assign(value)
    masks = [(c.get_dropout_mask(None), c.get_recurrent_dropout_mask(None)) for c in cells]
    return [tuple(() if mask is None else mask for mask in pair) for pair in masks]


@contextlib.contextmanager
def _fixed(cells, masks):
    """Gives cells their dropout masks, if any: when a gradient is computed, a layer has forgotten what it drew."""
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
