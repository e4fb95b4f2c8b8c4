"""The recurrent layer for cells that solve an ODE at every step."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_node.gradients.custom_vjp import custom_vjp, differentiated_as
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.scan import Scan
from keras_node.jit_compile import compiles
from keras_node.pure_function import PureFunction, RecordingScope, is_seed
from keras_node.solution import Stats, check_status
from keras_node.solve import Problem, Trajectory, solve
from keras_node.solvers.runge_kutta import RungeKutta


class SeriesRNN(keras.layers.RNN):
    """A `keras.layers.RNN` for cells that solve an ODE at every step. In a graph its loop is a `Scan`.

    With `training=False` the loop keeps nothing for a gradient; if a gradient is needed after all, the loop runs once
    more. In training, the loop and its gradient are one XLA program each, if `jit_compile` says so. With
    `gradient="direct"` TensorFlow differentiates the loop itself and keeps everything that a step computes. In eager
    mode, unrolled, and if a wrapped cell solves as well, the loop of Keras runs instead.

    A cell must have the attributes `options`, `gradient`, `statistics`, `dropout_cells` and `is_nested`, and two
    methods: `solve(y0, ts, **options)` calls `odeint` with its field, and `advance(inputs, states, training, move)`
    computes one step, in which `move(y0, ts, **options)` returns the state after a solve.
    """

    def inner_loop(
        self, sequences: tf.Tensor, initial_state: Any, mask: tf.Tensor | None, training: bool | None = False
    ) -> tuple[tf.Tensor, tf.Tensor, Any]:
        # The solve of a wrapped cell could not raise inside an XLA program, and no status of it would reach the loop.
        if tf.executing_eagerly() or self.unroll or self.cell.is_nested:
            return super().inner_loop(sequences, initial_state, mask, training)
        with self.cell.options.telling():
            return self._scan(sequences, initial_state, mask, training)

    def _scan(self, sequences: tf.Tensor, initial_state: Any, mask: tf.Tensor | None, training: bool | None) -> tuple:
        cell, x = self.cell, self._steps(sequences)
        states = keras.tree.flatten(initial_state)
        # One dropout mask serves the whole series.
        masks = _dropout_masks(cell, x[0], initial_state) if training else ()
        scan = Scan(
            self._step(x[0], initial_state, masks, training),
            x,
            masks,
            None if mask is None else self._steps(tf.cast(mask, tf.bool)),
            keeps_outputs=self.return_sequences,
            zero_output=self.zero_output_for_mask,
            knows_solutions=hasattr(cell.gradient, "with_known_result"),
            exported=training is not True,
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

    def _with_gradient(self, scan: Scan, inputs: tuple, training: bool | None) -> Any:
        step, state, options = scan.step, inputs[1][0], self.cell.options
        jit_compile = compiles(options.when_to_compile, options.gradient, training, step, state, scan.size)

        def in_training(*inputs: Any) -> Any:
            (*ys, _, _), others = custom_vjp(scan.keeping, scan.backward, _conclude, inputs, step, jit_compile)
            return tuple(ys), others

        def in_inference(*inputs: Any) -> Any:
            return scan.forward(*inputs)[:2]

        if training is not False:
            return in_training(*inputs)
        # In inference, nothing is kept for a gradient. If a gradient is needed after all, the loop runs once more.
        return differentiated_as(in_inference, in_training, inputs, step, jit_compile)

    def _step(self, x: tf.Tensor, initial_state: Any, masks: Any, training: bool | None) -> PureFunction:
        """Returns one step of the cell as a `PureFunction`, for a `Scan`."""
        cell = self.cell

        def step(
            x: tf.Tensor, states: Any, solved: Any, backward_statuses: Any, masks: Any, solves: bool = True
        ) -> tuple:
            moved: list[tf.Tensor] = []
            statuses: list[tf.Tensor] = []

            def gradient(i: int) -> Any:
                if not solves:
                    return _NoSolve()
                if isinstance(cell.gradient, DirectGradient):
                    return cell.gradient
                if solved is None:
                    return _NoGradient()
                return _Reporting(
                    cell.gradient.with_known_result(solved[i]) if solved else cell.gradient, backward_statuses[i]
                )

            def move(y0: tf.Tensor, ts: Any, **options: Any) -> tf.Tensor:
                options.update(
                    gradient=gradient(len(moved)), throw=False, jit_compile=False, statistics=cell.statistics
                )
                solution = cell.solve(y0, ts, **options)
                moved.append(solution.ys[-1])
                statuses.append(tf.reduce_max(solution.status))
                return moved[-1]

            states = keras.tree.pack_sequence_as(initial_state, states)
            by_cell = {id(c): pair for c, pair in zip(cell.dropout_cells, masks, strict=True)} if masks else {}
            output, states = _with_masks(cell, by_cell).advance(x, states, training, move)
            return output, keras.tree.flatten(states), moved, tf.reduce_max(statuses)

        # To see what a step reads, it is enough to evaluate its field. To trace whole solves would take far longer.
        without_solves = functools.partial(step, solves=False)
        pure = PureFunction(step, x, keras.tree.flatten(initial_state), (), (), masks, recorded_as=without_solves)
        if pure.losses:
            raise ValueError(
                "A step of a recurrent layer cannot add losses: activity regularizers and `add_loss` have no effect in "
                "the loop over a series. Regularize the output of the layer, or its weights. "
                f"Received: {len(pure.losses)} loss(es) in a step"
            )
        return pure

    def _steps(self, x: tf.Tensor) -> tf.Tensor:
        """Transposes `(batch, T, ...)` to `(T, batch, ...)`, in the order of processing."""
        return tf.reverse(_swapped(x), [0]) if self.go_backwards else _swapped(x)


def for_short_intervals(solver: RungeKutta, gradient: Any) -> RungeKutta:
    """Returns the solver of a cell, which tries the whole interval first if it is adaptive and has no `first_step`.

    Observations are mostly so close to each other that one step is enough. Estimating a first step, and beginning with
    a short one, would double the work. If the whole interval is too long a step, the solver rejects it and learns from
    its error how long a step may be.
    """
    # The "direct" gradient goes through rejected steps too. Under XLA it is NaN if one of them left the field's domain.
    if not solver.adaptive or solver.first_step is not None or isinstance(gradient, DirectGradient):
        return solver
    return dataclasses.replace(solver, first_step=math.inf)


def _conclude(gradients: Any, worst: tf.Tensor, dys: Any) -> Any:
    del dys
    return check_status(worst, gradients, "The solve of the adjoint")


class _NoGradient(DirectGradient):
    """Takes the place of a gradient where none is computed: in a loop that has a gradient as a whole."""

    def __call__(self, problem: Problem) -> Trajectory:
        trajectory, _ = solve(problem)
        return trajectory


class _NoSolve(DirectGradient):
    """Takes the place of a gradient. It evaluates the field once and solves nothing: the state stays where it is."""

    def __call__(self, problem: Problem) -> Trajectory:
        problem.vector_field(problem.times[0], problem.y0, problem.params)
        ys = tf.nest.map_structure(lambda y: tf.stack([y, y]), problem.y0)
        return Trajectory(ys, Stats.zeros(), tf.constant(0))


class _Reporting(DirectGradient):
    """The given gradient, which also reports the status of its own solve, as the gradient of `status`."""

    def __init__(self, gradient: Any, status: tf.Tensor) -> None:
        self.gradient = gradient
        self.status = status

    def __call__(self, problem: Problem) -> Trajectory:
        return self.gradient(problem._replace(backward_status=self.status))


def _dropout_masks(cell: Any, x: tf.Tensor, states: Any) -> Sequence[tuple]:
    """Returns the dropout masks of a series. A step that solves nothing draws them."""
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


def _with_masks(cell: Any, masks: dict[int, tuple]) -> Any:
    """Returns the cell, or a shallow copy whose inner cells use these dropout masks, by the `id` of an inner cell.

    A call of a cell has no argument for masks: it asks its own methods. By the time a gradient is computed, the cells
    have forgotten their masks. And they must not draw them again from the same seeds, because TensorFlow draws other
    numbers in an XLA program than outside it.
    """
    own: dict[str, Any] = {}
    if id(cell) in masks:
        mask, recurrent_mask = (None if isinstance(mask, tuple) else mask for mask in masks[id(cell)])
        own.update(get_dropout_mask=lambda _: mask, get_recurrent_dropout_mask=lambda _: recurrent_mask)
    elif masks and hasattr(cell, "cells"):
        own["cells"] = [_with_masks(inner, masks) for inner in cell.cells]
    elif masks and hasattr(cell, "dropout_cells"):
        own["cell"] = _with_masks(cell.cell, masks)
    if not own:
        return cell
    copied = object.__new__(type(cell))  # `copy.copy` would copy the weights too
    vars(copied).update({**vars(cell), **own})
    return copied


def _swapped(x: tf.Tensor) -> tf.Tensor:
    """Exchanges the first two axes of a tensor."""
    return tf.transpose(x, [1, 0, *range(2, x.shape.rank)])
