"""A recurrent cell whose state follows an ODE between observations."""

import inspect
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_node.layers.series import for_short_intervals
from keras_node.metrics import SolverMetrics
from keras_node.signatures import build, call_arguments
from keras_node.solution import Solution
from keras_node.solve_options import Gradient, Solver, SolvingLayer

# `keras.layers.RNN` resets the dropout masks of a cell only if it has this base class, which Keras does not export.
_DropoutRNNCell: Any = next(base for base in keras.layers.GRUCell.__bases__ if hasattr(base, "reset_dropout_mask"))


@keras.saving.register_keras_serializable(package="keras_node")
class ODERNNCell(SolvingLayer, _DropoutRNNCell):
    """Wraps a recurrent cell, whose state then follows an ODE until the next observation.

    From the observation at `t[i - 1]` to the one at `t[i]`:

    `h' = h[i - 1] + integral of f(t, h(t)) dt from 0 to t[i] - t[i - 1]`

    `output[i], h[i] = cell(x[i], h')`

    You can use it wherever Keras takes a cell: in `keras.layers.RNN`, stateful or not, and in
    `keras.layers.StackedRNNCells`. Each sample of a batch may have a different interval; one solve does them all. For
    series with times and masks use `keras_node.ODERNN`.

    In a stack of cells only the first cell receives the time. To move the states of several cells, wrap the stack,
    `ODERNNCell(keras.layers.StackedRNNCells([...]), field, evolve=(0, 1))`, or stack `keras_node.ODERNN` layers.

    Args:
        cell: the Keras cell to wrap: a `SimpleRNNCell`, `GRUCell`, `LSTMCell`, `StackedRNNCells` or your own layer.
        vector_field: the field that moves the state, a Keras layer or model, or a registered callable. It takes `(h)`
            or `(t, h)`. `t` is the time since the last observation, which runs from 0 to the interval.
        time_feature: whether the last channel of the input is the interval, the time elapsed since the previous
            observation, in any unit. The cell does not see this channel. An interval of zero leaves the state exactly
            as it was, and a negative interval moves it backward in time. Defaults to `True`.
        interval: the interval before every observation if `time_feature` is false. Defaults to `1.0`.
        solver: as in `keras_node.ODELayer`. An adaptive solver tries the whole interval first, unless it has a
            `first_step` or the gradient is `"direct"`.
        gradient: as in `keras_node.ODELayer`.
        evolve: which states of the cell the ODE moves, an index or a tuple of indices. If there are several, the field
            sees and moves their concatenation. Defaults to `0`, the first state: `h` of an `LSTMCell` moves, and its
            memory `c` stays (ODE-LSTM). `(0, 1)` moves both. The states of stacked cells are numbered one after the
            other.
        jit_compile: as in `keras_node.ODELayer`.
        track_stats: as in `keras_node.ODELayer`, but for forward solves only. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name`. `dtype` defaults to that of the cell.

    Call arguments:
        inputs: the observation, `(batch, features)`, or `(batch, features + 1)` with `time_feature`.
        states: the states of the wrapped cell.
        training: Python boolean, passed to the field and the cell.

    Input shape:
        `(batch, features)`, or `(batch, features + 1)` with `time_feature`.

    Output shape:
        The output and the states of the wrapped cell, `(output, states)`.

    Masking:
        The layer around the cell handles masked steps. `keras.layers.RNN` leaves the states of a masked step as they
        were and loses its interval; `keras_node.ODERNN` adds this interval to the next one.

    Raises:
        TypeError: if `cell` is not a Keras cell.
        ValueError: for an `evolve` that the cell does not have, for `interval` together with `time_feature`, and for a
            field that takes `args`.
        tf.errors.InvalidArgumentError: if a solve fails. In a model that is compiled with XLA nothing can raise;
            the states are NaN instead.

    Example:
        >>> field = keras.Sequential([keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(8)])
        >>> cell = keras_node.ODERNNCell(keras.layers.LSTMCell(8), field)
        >>> x, elapsed = keras.random.normal((2, 5, 3)), keras.random.uniform((2, 5, 1))
        >>> keras.layers.RNN(cell)(keras.ops.concatenate([x, elapsed], axis=-1)).shape
        TensorShape([2, 8])

    Reference:

        - Rubanova, Chen & Duvenaud (2019), "Latent ODEs for Irregularly-Sampled Time Series", arXiv:1907.03907,
          section 3.
        - Lechner & Hasani (2020), "Learning Long-Term Dependencies in Irregularly-Sampled Time Series",
          arXiv:2006.04418.
    """

    nested: ClassVar = {"cell": "cell", "vector_field": "vector_field"}

    def __init__(
        self,
        cell: keras.Layer,
        vector_field: keras.Layer | Callable,
        *,
        time_feature: bool = True,
        interval: float = 1.0,
        solver: Solver = "tsit5",
        gradient: Gradient | None = None,
        evolve: int | Sequence[int] | None = None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        is_cell = isinstance(cell, keras.Layer) and hasattr(cell, "state_size")
        # A layer such as `GRU` has a `state_size` too, that of its cell.
        if not is_cell or isinstance(cell, keras.layers.RNN):
            raise TypeError(
                "`cell` must be a Keras layer with `state_size` for one step, such as `keras.layers.GRUCell(32)`. "
                f"Received: cell={cell!r} (of type {type(cell).__name__})"
            )
        # Without autocast, a time keeps its digits under a mixed policy.
        super().__init__(autocast=False, **{"dtype": cell.dtype_policy, **kwargs})
        if call_arguments(vector_field)[0] == 3:
            raise ValueError(
                "The field of a cell must take `(h)` or `(t, h)`, without further arguments. Remove its `args`. "
                f"Received: vector_field={vector_field!r}"
            )
        if time_feature and interval != 1.0:
            raise ValueError(
                "`interval` has no effect if the last channel of the input is the interval. Pass `time_feature=False` "
                f"together with it, or leave it out. Received: interval={interval}, time_feature={time_feature}"
            )
        self.cell = cell
        self.vector_field = vector_field
        self.time_feature = time_feature
        self.interval = float(interval)
        self.set_options(solver, gradient, jit_compile, track_stats, counts_backward=False)
        self.evolve = _indices(evolve, len(self._state_sizes()))

    @property
    def state_size(self) -> Any:
        return self.cell.state_size

    @property
    def output_size(self) -> Any:
        return getattr(self.cell, "output_size", None)

    def get_initial_state(self, batch_size: int | tf.Tensor | None = None) -> Any:
        if hasattr(self.cell, "get_initial_state"):
            return self.cell.get_initial_state(batch_size=batch_size)
        return keras.tree.map_structure(
            lambda size: ops.zeros((batch_size, size), dtype=self.compute_dtype), self.state_size
        )

    def build(self, input_shape: tuple) -> None:
        if self.time_feature:
            if len(input_shape) != 2 or input_shape[-1] < 2:
                raise ValueError(
                    "With `time_feature` the input of a step must be `(batch, features + 1)`: the features of the "
                    "observation and, in the last channel, the time elapsed. "
                    f"Received: input_shape={tuple(input_shape)}"
                )
            input_shape = (input_shape[0], input_shape[-1] - 1)
        if not self.cell.built:
            self.cell.build(input_shape)
        if isinstance(self.vector_field, keras.Layer):
            size = sum(self._state_sizes()[i] for i in self.evolve)
            own_times = self.time_feature or self.solver.per_sample
            t = keras.KerasTensor((None, 1) if own_times else (), dtype=self.variable_dtype)
            build(self.vector_field, t, keras.KerasTensor((None, size), dtype=self.variable_dtype))

    def call(self, inputs: tf.Tensor, states: Any, training: bool | None = None) -> tuple[tf.Tensor, Any]:
        return self.advance(inputs, states, training, lambda *args, **options: self.solve(*args, **options).ys[-1])

    def advance(self, inputs: tf.Tensor, states: Any, training: bool | None, move: Callable) -> tuple[tf.Tensor, Any]:
        """Computes one step. `move(y0, ts, training=training)` returns the moving state after the interval."""
        ts: Any = [0.0, self.interval]
        if self.time_feature:
            inputs, elapsed = inputs[:, :-1], inputs[:, -1]
            ts = ops.stack([ops.zeros_like(elapsed), elapsed])
        leaves = keras.tree.flatten(states)
        moving = [leaves[i] for i in self.evolve]
        h = moving[0] if len(moving) == 1 else ops.concatenate(moving, axis=-1)
        h = move(h, ts, training=training)
        ends = [sum(s.shape[-1] for s in moving[:i]) for i in range(1, len(moving))]
        for i, state in zip(self.evolve, ops.split(h, ends, axis=-1) if ends else [h], strict=True):
            leaves[i] = state
        takes_training = "training" in inspect.signature(self.cell.call).parameters
        keywords = {"training": training} if takes_training else {}
        return self.cell(inputs, keras.tree.pack_sequence_as(states, leaves), **keywords)

    def solve(self, y0: tf.Tensor, ts: Any, **options: Any) -> Solution:
        """Calls `keras_node.odeint` with the field and the options of this cell."""
        own = {"solver": for_short_intervals(self.solver, self.gradient)}
        return self.options.solve(self.vector_field, y0, ts, **{**own, **options})

    @property
    def statistics(self) -> SolverMetrics | None:
        return self.options.metrics

    @property
    def is_nested(self) -> bool:
        """Whether a wrapped cell solves an ODE as well."""
        return any(isinstance(cell, ODERNNCell) for cell in (self.cell, *getattr(self.cell, "cells", ())))

    @property
    def dropout_cells(self) -> list:
        """The wrapped cells that draw dropout masks."""
        return _dropout_cells(self.cell)

    def _state_sizes(self) -> list[int]:
        return keras.tree.flatten(self.state_size)

    # `keras.layers.RNN` calls these methods before and after a series. The wrapped cell draws its masks itself, at its
    # first step, and keeps them for the series; so only the resets are passed on to it.

    def get_dropout_mask(self, step_input: tf.Tensor) -> None:
        del step_input

    def get_recurrent_dropout_mask(self, step_input: tf.Tensor) -> None:
        del step_input

    def reset_dropout_mask(self) -> None:
        for cell in self.dropout_cells:
            cell.reset_dropout_mask()

    def reset_recurrent_dropout_mask(self) -> None:
        for cell in self.dropout_cells:
            cell.reset_recurrent_dropout_mask()

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(time_feature=self.time_feature, interval=self.interval, evolve=self.evolve)
        return config


def _indices(evolve: Any, num_states: int) -> tuple[int, ...]:
    """Returns the states to move as a tuple of different indices of 0 or more."""
    indices = (0,) if evolve is None else tuple(evolve) if isinstance(evolve, Iterable) else (evolve,)
    known = all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in indices)
    usable = known and all(-num_states <= i < num_states for i in indices)
    positive = tuple(int(i) % num_states for i in indices) if usable else ()
    if not positive or len(set(positive)) < len(positive):
        raise ValueError(
            "`evolve` must be the index of one of the states of the cell, or a tuple of different indices. "
            f"Received: evolve={evolve!r} for a cell with {num_states} state(s)"
        )
    return positive


def _dropout_cells(cell: keras.Layer) -> list:
    """Returns the cells that draw dropout masks: the cell itself, or the cells inside it."""
    if isinstance(cell, ODERNNCell):
        return cell.dropout_cells
    if hasattr(cell, "reset_dropout_mask"):
        return [cell]
    return [dropout_cell for part in getattr(cell, "cells", ()) for dropout_cell in _dropout_cells(part)]
