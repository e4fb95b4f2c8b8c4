"""A recurrent cell whose state keeps moving between observations."""

import inspect
from typing import ClassVar

import keras
from keras import ops

from keras_node.layers.series import for_short_intervals
from keras_node.signatures import build, call_arguments
from keras_node.solve_options import SolvingLayer

# `keras.layers.RNN` renews the dropout masks of cells of this class, which has no public name of its own.
(_DropoutRNNCell,) = (base for base in keras.layers.GRUCell.__bases__ if hasattr(base, "reset_dropout_mask"))


@keras.saving.register_keras_serializable(package="keras_node")
class ODERNNCell(SolvingLayer, keras.layers.Layer, _DropoutRNNCell):
    """Wraps a recurrent cell: its state follows an ODE until the observation comes, which the cell then takes in.

    From the observation at `t[i - 1]` to that at `t[i]`,

    `h' = h[i - 1] + integral of f(t, h(t)) dt from 0 to t[i] - t[i - 1]`

    `output[i], h[i] = cell(x[i], h')`

    It serves wherever a Keras cell does: in `keras.layers.RNN`, stateful or not, and in
    `keras.layers.StackedRNNCells`. Every sample of a batch has an interval of its own, all in one solve. For series
    with times and masks, `keras_node.ODERNN` is the layer.

    Args:
        cell: the Keras cell to wrap: a `SimpleRNNCell`, `GRUCell`, `LSTMCell`, `StackedRNNCells` or your own layer.
        vector_field: what moves the state: a Keras layer or model, or a registered callable, `(h)` or `(t, h)`. `t` is
            the time since the last observation; it runs from 0 to the interval.
        time_feature: whether the last channel of the input is the interval, the time elapsed since the previous
            observation; the cell does not see that channel. An interval of zero leaves the state exactly as it was,
            a negative one moves it backwards. Defaults to `True`.
        interval: without `time_feature`, the interval before every observation. Defaults to `1.0`.
        solver: as in `keras_node.ODELayer`. An adaptive one attempts the whole interval first, unless it has a
            `first_step` or the gradient is `"direct"`.
        gradient: as in `keras_node.ODELayer`.
        evolve: which of the cell's states move, an index or several; of several, the field sees and moves the
            concatenation. Defaults to `0`, the first: `h` of an `LSTMCell` moves and its memory `c` stays (ODE-LSTM).
            `(0, 1)` moves both. States of stacked cells are counted through.
        jit_compile: as in `keras_node.ODELayer`.
        track_stats: as in `keras_node.ODELayer`, of the forward solves. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name`. `dtype` defaults to the cell's.

    Call arguments:
        inputs: the observation, `(batch, features)`, with `time_feature` `(batch, features + 1)`.
        states: the states of the wrapped cell.
        training: Python boolean, handed on to the field and the cell.

    Masks of steps are the concern of the layer around the cell: `keras.layers.RNN` leaves the states of a masked step
    as they were, and its interval is lost; `keras_node.ODERNN` adds it to the next one.

    Input shape:
        `(batch, features)`, or `(batch, features + 1)` with `time_feature`.

    Output shape:
        That of the wrapped cell: its output, and its states.

    In a stack of cells only the first receives the time. To move the states of several cells, wrap the stack:
    `ODERNNCell(keras.layers.StackedRNNCells([...]), field, evolve=(0, 1))`, or stack `keras_node.ODERNN` layers.

    Example:
    >>> field = keras.Sequential([keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(8)])
    >>> cell = keras_node.ODERNNCell(keras.layers.LSTMCell(8), field)
    >>> x, elapsed = keras.random.normal((2, 5, 3)), keras.random.uniform((2, 5, 1))
    >>> keras.layers.RNN(cell)(keras.ops.concatenate([x, elapsed], axis=-1)).shape
    TensorShape([2, 8])

    Reference:

    - Rubanova, Chen & Duvenaud (2019), "Latent ODEs for Irregularly-Sampled Time Series".
    - Lechner & Hasani (2020), "Learning Long-Term Dependencies in Irregularly-Sampled Time Series".
    """

    nested: ClassVar = {"cell": "cell", "vector_field": "vector_field"}

    def __init__(
        self,
        cell,
        vector_field,
        *,
        time_feature: bool = True,
        interval: float = 1.0,
        solver="tsit5",
        gradient="backsolve",
        evolve=None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs,
    ):
        if not isinstance(cell, keras.Layer) or not hasattr(cell, "state_size"):
            raise TypeError(
                "`cell` must be a Keras layer with `state_size`, such as `keras.layers.GRUCell(32)`. "
                f"Received: cell={cell!r} (of type {type(cell).__name__})"
            )
        # The input is not cast: a time must not lose its digits under a mixed policy.
        super().__init__(autocast=False, **{"dtype": cell.dtype_policy, **kwargs})
        if call_arguments(vector_field)[0] == 3:
            raise ValueError(f"The field of a cell takes `(h)` or `(t, h)`. Received: vector_field={vector_field!r}")
        if time_feature and interval != 1.0:
            raise ValueError(
                "`interval` has no effect where the last channel of the input is the interval; pass "
                f"`time_feature=False` with it. Received: interval={interval}, time_feature={time_feature}"
            )
        self.cell = cell
        self.vector_field = vector_field
        self.time_feature = time_feature
        self.interval = float(interval)
        self.set_options(solver, gradient, jit_compile, track_stats, counts_backward=False)
        self.evolve = _indices(evolve, len(self._state_sizes()))

    @property
    def state_size(self):
        return self.cell.state_size

    @property
    def output_size(self):
        return getattr(self.cell, "output_size", None)

    def get_initial_state(self, batch_size=None):
        if hasattr(self.cell, "get_initial_state"):
            return self.cell.get_initial_state(batch_size=batch_size)
        return keras.tree.map_structure(
            lambda size: ops.zeros((batch_size, size), dtype=self.compute_dtype), self.state_size
        )

    def build(self, input_shape):
        if self.time_feature:
            if len(input_shape) != 2 or input_shape[-1] < 2:
                raise ValueError(
                    "With `time_feature` the input of a step is `(batch, features + 1)`: the observation's features "
                    f"and, in the last channel, the time elapsed. Received: input_shape={tuple(input_shape)}"
                )
            input_shape = (input_shape[0], input_shape[-1] - 1)
        if not self.cell.built:
            self.cell.build(input_shape)
        if isinstance(self.vector_field, keras.Layer):
            size = sum(self._state_sizes()[i] for i in self.evolve)
            own_times = self.time_feature or self.solver.per_sample
            t = keras.KerasTensor((None, 1) if own_times else (), dtype=self.variable_dtype)
            build(self.vector_field, t, keras.KerasTensor((None, size), dtype=self.variable_dtype))

    def call(self, inputs, states, training=None):
        return self.advance(inputs, states, training, lambda *args, **options: self.solve(*args, **options).ys[-1])

    def advance(self, inputs, states, training, move):
        """A step in which `move(y0, ts, training=training)` gives the states behind the interval."""
        ts = [0.0, self.interval]
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

    def solve(self, y0, ts, **options):
        """`keras_node.odeint` with the field and the options of this cell."""
        own = {"solver": for_short_intervals(self.solver, self.gradient)}
        return self.options.solve(self.vector_field, y0, ts, **{**own, **options})

    @property
    def statistics(self):
        return self.options.metrics

    @property
    def is_nested(self):
        """Whether a wrapped cell solves an ODE as well."""
        return any(isinstance(cell, ODERNNCell) for cell in (self.cell, *getattr(self.cell, "cells", ())))

    @property
    def dropout_cells(self):
        """The wrapped cells that draw dropout masks."""
        return _dropout_cells(self.cell)

    def _state_sizes(self):
        return keras.tree.flatten(self.state_size)

    # The wrapped cell draws its masks at its first step and keeps them for the series.

    def get_dropout_mask(self, step_input):
        del step_input

    def get_recurrent_dropout_mask(self, step_input):
        del step_input

    def reset_dropout_mask(self):
        for cell in self.dropout_cells:
            cell.reset_dropout_mask()

    def reset_recurrent_dropout_mask(self):
        for cell in self.dropout_cells:
            cell.reset_recurrent_dropout_mask()

    def get_config(self):
        config = super().get_config()
        config.update(time_feature=self.time_feature, interval=self.interval, evolve=self.evolve)
        return config


def _indices(evolve, num_states):
    """The states to move, as a tuple of different indices from 0 on."""
    indices = (0,) if evolve is None else tuple(evolve) if isinstance(evolve, list | tuple) else (evolve,)
    usable = all(isinstance(i, int) and not isinstance(i, bool) and -num_states <= i < num_states for i in indices)
    positive = tuple(i % num_states for i in indices) if usable else ()
    if not positive or len(set(positive)) < len(positive):
        raise ValueError(
            "`evolve` must be the index of one of the cell's states, or a tuple of different ones. "
            f"Received: evolve={evolve!r} for a cell with {num_states} state(s)"
        )
    return positive


def _dropout_cells(cell):
    """The cells with dropout masks in a cell, which may be a stack."""
    if isinstance(cell, ODERNNCell):
        return cell.dropout_cells
    if hasattr(cell, "reset_dropout_mask"):
        return [cell]
    return [dropout_cell for part in getattr(cell, "cells", ()) for dropout_cell in _dropout_cells(part)]
