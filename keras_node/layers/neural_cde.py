"""A layer whose state is driven by a path through irregular observations."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_node.arguments import positive_integer
from keras_node.autograph import without_autograph
from keras_node.control import INTERPOLATIONS, differentiate, increments, is_observed, pieces, polynomial
from keras_node.layers.irregular_times import as_array, check_order, check_steps
from keras_node.layers.series import SeriesRNN, for_short_intervals
from keras_node.nested_layers import keep_frozen
from keras_node.signatures import build, call_arguments
from keras_node.solution import Solution
from keras_node.solve_options import Gradient, SolveOptions, Solver, SolvingLayer
from keras_node.times import prepare_times


@keras.saving.register_keras_serializable(package="keras_node")
class NeuralCDE(SolvingLayer):
    """A neural controlled differential equation: a path through the observations drives the state.

    `z(t0) = dense(x(t0))`

    `dz = f(z) dX`, `X(t) = (t, x(t))`

    `X` is a path through the observations and their times, and `f(z)` is a matrix with one column for each channel of
    `X`. In an ODE-RNN the state jumps at an observation; here the observations drive the ODE itself. The layer solves
    once for each interval between two observations. Within an interval the path is a polynomial, so the solver never
    meets a kink, and samples may have different times.

    Args:
        units: size of the state `z`, a positive integer.
        vector_field: the field `f`, a Keras layer or model, or a registered callable. It maps `(batch, units)` to
            `(batch, units, 1 + channels)` or `(batch, units * (1 + channels))`; the column of time comes first. End it
            with a bounded activation, because a state that a path drives can grow fast. Defaults to a network with one
            hidden layer of 128 units with `relu`, and a `tanh` at the end, as in the paper. With a smooth activation,
            gradients are more accurate.
        interpolation: the kind of path, `"hermite"` (default), `"linear"` or `"rectilinear"` (see
            `keras_node.control_path`). With `"rectilinear"` no state depends on later observations, even if values are
            missing, at the price of twice as many solves: first the time passes while `x` stays, then `x` changes while
            the time stays.
        solver: as in `keras_node.ODELayer`. Each solve runs from 0 to 1 over one interval, so this interval is the
            unit of `step_size` and `first_step`. An adaptive solver tries the whole interval first, unless it has a
            `first_step` or the gradient is `"direct"`.
        gradient: as in `keras_node.ODELayer`.
        return_sequences: whether to return the state at every step instead of only the last one. Defaults to `False`.
        jit_compile: as in `keras_node.ODELayer`, for the loop over the steps with all its solves.
        track_stats: as in `keras_node.ODELayer`, but for forward solves only. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: the observations, `(batch, T, channels)`. A NaN is a missing value.
        times: the times of the observations, `(batch, T)`, in any unit. They must not decrease from one observation to
            the next. Only their differences matter, because time is counted from the first observation of each sample.
            The field does not see `t`. It sees its differences as the first channel of `dX`, so choose a unit in which
            a series lasts a few units: then time varies as much as values that were scaled to a variance of 1.
        mask: boolean, `(batch, T)` or `(batch, T, channels)`; false where there is no observation. By default the mask
            that a layer such as `Masking` gave to `x`.
        training: Python boolean, passed to the field.
        x_mask: Keras passes the mask of `x` here; pass `mask` instead.

    Input shape:
        `(batch, T, channels)`.

    Output shape:
        `(batch, units)`, or `(batch, T, units)` with `return_sequences`.

    Masking:
        Masked values are missing values: what `x` holds there has no effect. At a step without any observation, `times`
        has no effect either, and the state stays as it was. Masked steps have no part in the error that the solver
        controls; steps whose values are all NaN have one, so pass a mask for padding. With `return_sequences` the
        output carries the mask.

    Raises:
        ValueError: for inputs of another shape, and for times that decrease.
        tf.errors.InvalidArgumentError: in a graph, for times that decrease, and if a solve fails. In a model
            that is compiled with XLA nothing can raise; the results of that sample are NaN instead.

    Example:
        >>> layer = keras_node.NeuralCDE(8)
        >>> x = keras.random.normal((2, 5, 3))
        >>> times = keras.ops.cumsum(keras.random.uniform((2, 5)), axis=1)
        >>> layer(x, times).shape
        TensorShape([2, 8])

        With your own field, and with missing values (here wherever `x` is negative):

        >>> field = keras.Sequential([keras.layers.Dense(16, activation="silu"), keras.layers.Dense(8 * 4, "tanh")])
        >>> layer = keras_node.NeuralCDE(8, field, interpolation="rectilinear", return_sequences=True)
        >>> layer(x, times, mask=x >= 0).shape
        TensorShape([2, 5, 8])

    Reference:

        - Kidger, Morrill, Foster & Lyons (2020), "Neural Controlled Differential Equations for Irregular Time Series",
          arXiv:2005.08926.
        - Morrill, Kidger, Yang & Lyons (2021), "Neural Controlled Differential Equations for Online Prediction Tasks",
          arXiv:2106.11028: the kinds of paths.
    """

    def __init__(
        self,
        units: int,
        vector_field: keras.Layer | Callable | None = None,
        *,
        interpolation: str = "hermite",
        solver: Solver = "tsit5",
        gradient: Gradient | None = None,
        return_sequences: bool = False,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        # Without autocast, times keep their digits under a mixed policy.
        super().__init__(autocast=False, **kwargs)
        if interpolation not in INTERPOLATIONS:
            names = ", ".join(repr(name) for name in INTERPOLATIONS)
            raise ValueError(f"`interpolation` must be one of {names}. Received: interpolation={interpolation!r}")
        if vector_field is not None and call_arguments(vector_field)[0] != 1:
            raise ValueError(
                "The field of a controlled equation must take only the state, `(z)`; time is a channel of the path. "
                f"Received: vector_field={vector_field!r}"
            )
        self.units = positive_integer("units", units)
        self.vector_field = vector_field
        self.interpolation = interpolation
        self.return_sequences = return_sequences
        self.set_options(solver, gradient, jit_compile, track_stats, counts_backward=False)
        self.supports_masking = True

    @without_autograph
    def __call__(self, x: Any, times: Any, *args: Any, **kwargs: Any) -> tf.Tensor:
        check_steps(x, self)
        return super().__call__(x, as_array(times), *args, **kwargs)

    def build(self, x_shape: tuple) -> None:
        # TensorFlow ends the process where a graph multiplies a tensor without channels by a kernel.
        if len(x_shape) != 3 or not x_shape[-1]:
            raise ValueError(
                "`x` must be of shape (batch, T, channels), with a known number of channels, 1 or more. "
                f"Received: x.shape={tuple(x_shape)}"
            )
        channels = 1 + x_shape[-1]
        field = self.vector_field
        if field is None:
            hidden = keras.layers.Dense(128, activation="relu", dtype=self.dtype_policy)
            matrix = keras.layers.Dense(self.units * channels, activation="tanh", dtype=self.dtype_policy)
            field = keras.Sequential([hidden, matrix])
        controlled = _Controlled(field, self.units, dtype=self.variable_dtype, autocast=False, name="field")
        degree = 3 if self.interpolation == "hermite" else 1
        shapes = (None, 1) if self.solver.per_sample else (), (None, self.units), (None, degree, channels)
        build(controlled, *(keras.KerasTensor(shape, dtype=self.variable_dtype) for shape in shapes))
        cell = _Cell(
            controlled, self.units, x_shape[-1], self.options, dtype=self.variable_dtype, autocast=False, name="cell"
        )
        self.rnn = SeriesRNN(
            cell, return_sequences=self.return_sequences, autocast=False, dtype=self.variable_dtype, name="rnn"
        )
        self.rnn.build((x_shape[0], None, degree, channels))
        self.initial = keras.layers.Dense(self.units, dtype=self.variable_dtype, name="initial")
        self.initial.build((None, x_shape[-1]))
        keep_frozen(self)

    def call(
        self,
        x: tf.Tensor,
        times: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
        x_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        times = prepare_times(times, self.variable_dtype)
        x = ops.cast(x, times.dtype)
        if x.shape[-1] is None:
            x = tf.ensure_shape(x, (None, None, self.rnn.cell.channels))
        mask = x_mask if mask is None else mask
        knots, coefficients, ordered = pieces(times, x, mask, self.interpolation)
        with tf.control_dependencies(check_order(ordered, times, self)):
            x0 = ops.cast(coefficients[:, 0, 0], self.variable_dtype)
        rates = self._rates(knots, coefficients)
        if mask is not None:
            rates = self._with_rest(rates, ops.any(is_observed(x, mask), axis=-1))
        states = self.rnn(rates, initial_state=[self.initial(x0)], training=training)
        if self.return_sequences and self.interpolation == "rectilinear":
            # In between are the states after the time has passed, but before the observation has come.
            states = states[:, ::2]
        ordered = ops.reshape(ordered, [-1] + [1] * (len(states.shape) - 1))
        return ops.cast(ops.where(ordered, states, float("nan")), self.compute_dtype)

    def _rates(self, knots: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
        """Returns the coefficients of `dX/ds` on the way to each knot, `(batch, T, degree, 1 + channels)`."""
        rates = differentiate(coefficients)
        elapsed = ops.expand_dims(ops.expand_dims(increments(knots), -1), -1)
        elapsed = ops.pad(elapsed, [(0, 0), (0, 0), (0, rates.shape[2] - 1), (0, 0)])
        rates = ops.concatenate([elapsed, rates], axis=-1)
        # The last piece has no length. Moved to the front, it leaves the state at the first knot as it is.
        rates = ops.concatenate([rates[:, -1:], rates[:, :-1]], axis=1)
        # In a solve, a state in half precision has single precision.
        return ops.cast(rates, "float64" if self.variable_dtype == "float64" else "float32")

    def _with_rest(self, rates: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
        """Appends an entry that is 1 on the way to a knot, and 0 before the first one and at masked steps.

        There the path does not move, and the sample should have no part in the error of a solve.
        """
        moves = valid & (ops.cumsum(ops.cast(valid, "int32"), axis=1) > 1)
        if self.interpolation == "rectilinear":
            moves = ops.repeat(moves, 2, axis=1)[:, 1:]
        moves = ops.cast(moves, rates.dtype)[..., None, None] + ops.zeros_like(rates[..., :1])
        return ops.concatenate([rates, moves], axis=-1)

    def compute_output_shape(self, x_shape: tuple) -> tuple:
        return (*x_shape[: 1 + self.return_sequences], self.units)

    def compute_mask(self, x: Any, previous_mask: Any) -> Any:
        del x
        return previous_mask if self.return_sequences else None

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            units=self.units,
            interpolation=self.interpolation,
            return_sequences=self.return_sequences,
        )
        return config


class _Controlled(keras.layers.Layer):
    """The field `dz/ds = f(z) dX/ds` on one piece of the path. `args` holds the coefficients of `dX/ds`."""

    def __init__(self, vector_field: keras.Layer | Callable, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vector_field = vector_field
        self.units = units

    def build(self, s_shape: tuple, z_shape: tuple) -> None:
        """Does nothing, because the field builds itself when it is called."""

    def call(self, s: tf.Tensor, z: tf.Tensor, args: tf.Tensor) -> tf.Tensor:
        matrix, channels = self.vector_field(z), args.shape[-1]
        if matrix.shape[1:] not in ((self.units, channels), (self.units * channels,)):
            raise ValueError(
                "The field of a controlled equation must return a matrix with a row for each unit and a column for "
                f"time and each channel, (batch, {self.units}, {channels}) or (batch, {self.units * channels}). "
                f"Received: shape={tuple(matrix.shape)} from {self.vector_field!r}"
            )
        matrix = ops.reshape(ops.cast(matrix, z.dtype), (-1, self.units, channels))
        return ops.sum(matrix * polynomial(ops.cast(args, z.dtype), s)[:, None], axis=-1)


class _Cell(keras.layers.Layer):
    """A cell that moves the state along one piece of the path."""

    is_nested, dropout_cells = False, ()

    def __init__(self, field: keras.Layer, units: int, channels: int, options: SolveOptions, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.field = field
        self.state_size = units
        self.channels = channels
        self.options = options
        self.gradient, self.statistics = options.gradient, options.metrics

    def call(self, rates: tf.Tensor, states: list, training: bool | None = None) -> tuple[tf.Tensor, list]:
        return self.advance(rates, states, training, lambda *args, **options: self.solve(*args, **options).ys[-1])

    def advance(self, rates: tf.Tensor, states: list, training: bool | None, move: Callable) -> tuple[tf.Tensor, list]:
        ts: Any = [0.0, 1.0]
        if rates.shape[-1] > 1 + self.channels:
            rates, moves = rates[..., :-1], rates[:, 0, -1]
            ts = ops.stack([ops.zeros_like(moves), moves])
        z = move(states[0], ts, args=rates, training=training)
        return z, [z]

    def solve(self, y0: tf.Tensor, ts: Any, **options: Any) -> Solution:
        own = {"solver": for_short_intervals(self.options.solver, self.gradient)}
        return self.options.solve(self.field, y0, ts, **{**own, **options})
