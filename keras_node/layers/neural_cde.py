"""A layer that is driven by a path through irregular observations."""

import keras
import tensorflow as tf
from keras import ops

from keras_node.arguments import positive_integer
from keras_node.control import INTERPOLATIONS, differentiate, increments, pieces, polynomial
from keras_node.layers.irregular_times import as_array, check_order, check_steps
from keras_node.layers.series import SeriesRNN, for_short_intervals
from keras_node.signatures import build, call_arguments
from keras_node.solve_options import SolvingLayer
from keras_node.times import prepare_times


@keras.saving.register_keras_serializable(package="keras_node")
class NeuralCDE(SolvingLayer, keras.layers.Layer):
    """A neural controlled differential equation: a state that moves as the path through the observations does.

    `z(t0) = dense(x(t0))`

    `dz = f(z) dX`, `X(t) = (t, x(t))`

    `X` is a path through the observations and their times, and `f(z)` a matrix with a column for each of its channels.
    Where an ODE-RNN jumps at an observation, here the observations steer the ODE itself. From one observation to the
    next there is one solve, in which the path is a polynomial, so that no solver meets a kink, and samples need no
    common times.

    Args:
        units: size of the state.
        vector_field: what gives `f(z)`: a Keras layer or model, or a registered callable, from `(batch, units)` to
            `(batch, units, 1 + channels)` or `(batch, units * (1 + channels))`; the column of time comes first. End it
            with a bounded activation: a state that the path drives may grow fast. By default one hidden layer of 128
            rectified units and a `tanh`.
        interpolation: `"hermite"` (default), `"linear"` or `"rectilinear"` (see `keras_node.control_path`). With
            `"rectilinear"`, at twice the number of solves, no state depends on later observations, even where values
            are missing: the state moves with time while `x` stays, and then with `x` while time stays.
        solver: as in `keras_node.ODELayer`; its unit of time is the interval between two observations. An adaptive one
            starts as that of `keras_node.ODERNNCell` does.
        gradient: as in `keras_node.ODELayer`.
        return_sequences: whether to return the state at every step, or the last one. Defaults to `False`.
        jit_compile: as in `keras_node.ODELayer`, for the loop over the steps with all its solves.
        track_stats: as in `keras_node.ODELayer`, of the forward solves. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: the observations, `(batch, T, channels)`. NaN is a missing value.
        times: when they were made, `(batch, T)`, in any unit. From one observation to the next they must not decrease.
            Only their differences matter: time is counted from a sample's first observation.
        mask: boolean, `(batch, T)` or `(batch, T, channels)`; false where there is no observation. What `x` and `times`
            hold there has no effect, and at a step without any the state stays as it was. By default the mask that a
            layer such as `Masking` gave to `x`.
        training: Python boolean, handed on to the field.
        x_mask: filled in by Keras with the mask of `x`; pass `mask` instead.

    Input shape:
        `(batch, T, channels)`.

    Output shape:
        `(batch, units)`, or `(batch, T, units)` with `return_sequences`.

    Times that decrease raise `ValueError`, in a graph `tf.errors.InvalidArgumentError`. Under XLA, where nothing can
    raise, all results are NaN for that sample.

    Example:
    >>> layer = keras_node.NeuralCDE(8)
    >>> x = keras.random.normal((2, 5, 3))
    >>> times = keras.ops.cumsum(keras.random.uniform((2, 5)), axis=1)
    >>> layer(x, times).shape
    TensorShape([2, 8])

    With a field of one's own, and missing values, here wherever `x` is negative:

    >>> field = keras.Sequential([keras.layers.Dense(16, activation="silu"), keras.layers.Dense(8 * 4, "tanh")])
    >>> layer = keras_node.NeuralCDE(8, field, interpolation="rectilinear", return_sequences=True)
    >>> layer(x, times, mask=x >= 0).shape
    TensorShape([2, 5, 8])

    Reference:

    - Kidger, Morrill, Foster & Lyons (2020), "Neural Controlled Differential Equations for Irregular Time Series".
    - Morrill, Kidger, Yang & Lyons (2021), "Neural Controlled Differential Equations for Online Prediction Tasks".
    """

    def __init__(
        self,
        units: int,
        vector_field=None,
        *,
        interpolation: str = "hermite",
        solver="tsit5",
        gradient="backsolve",
        return_sequences: bool = False,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs,
    ):
        # The input is not cast: times must not lose their digits under a mixed policy.
        super().__init__(autocast=False, **kwargs)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {INTERPOLATIONS}. Received: {interpolation!r}")
        if vector_field is not None and call_arguments(vector_field)[0] != 1:
            raise ValueError(
                "The field of a controlled equation takes the state alone, `(z)`: time is a channel of its path. "
                f"Received: vector_field={vector_field!r}"
            )
        self.units = positive_integer("units", units)
        self.vector_field = vector_field
        self.interpolation = interpolation
        self.return_sequences = return_sequences
        self.set_options(solver, gradient, jit_compile, track_stats, counts_backward=False)
        self.supports_masking = True

    def __call__(self, x, times, *args, **kwargs):
        check_steps(x, self)
        return super().__call__(x, as_array(times), *args, **kwargs)

    def build(self, x_shape):
        if len(x_shape) != 3 or x_shape[-1] is None:
            raise ValueError(f"`x` must be (batch, T, channels). Received: x.shape={tuple(x_shape)}")
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
        cell = _Cell(controlled, self.units, self.options, dtype=self.variable_dtype, autocast=False, name="cell")
        self.rnn = SeriesRNN(
            cell, return_sequences=self.return_sequences, autocast=False, dtype=self.variable_dtype, name="rnn"
        )
        self.rnn.build((x_shape[0], None, degree, channels))
        self.initial = keras.layers.Dense(self.units, dtype=self.variable_dtype, name="initial")
        self.initial.build((None, x_shape[-1]))

    def call(self, x, times, mask=None, training=None, x_mask=None):
        times = prepare_times(times, self.variable_dtype)
        x = ops.cast(x, times.dtype)
        knots, coefficients, ordered = pieces(times, x, x_mask if mask is None else mask, self.interpolation)
        with tf.control_dependencies(check_order(ordered, times, self)):
            x0 = ops.cast(coefficients[:, 0, 0], self.variable_dtype)
        states = self.rnn(self._rates(knots, coefficients), initial_state=[self.initial(x0)], training=training)
        if self.return_sequences and self.interpolation == "rectilinear":
            states = states[:, ::2]  # those between are of a time that has come before its observation
        ordered = ops.reshape(ordered, [-1] + [1] * (len(states.shape) - 1))
        return ops.cast(ops.where(ordered, states, float("nan")), self.compute_dtype)

    def _rates(self, knots, coefficients):
        """The coefficients of `dX/ds` on the way to every knot, `(batch, T, degree, 1 + channels)`."""
        rates = differentiate(coefficients)
        elapsed = ops.expand_dims(ops.expand_dims(increments(knots), -1), -1)
        elapsed = ops.pad(elapsed, [(0, 0), (0, 0), (0, rates.shape[2] - 1), (0, 0)])
        rates = ops.concatenate([elapsed, rates], axis=-1)
        # The last piece is of no length: it leaves the state at the first knot as it is.
        rates = ops.concatenate([rates[:, -1:], rates[:, :-1]], axis=1)
        return ops.cast(rates, self.variable_dtype)

    def compute_output_shape(self, x_shape):
        return (*x_shape[: 1 + self.return_sequences], self.units)

    def compute_mask(self, x, previous_mask):
        del x
        return previous_mask if self.return_sequences else None

    def get_config(self):
        config = super().get_config()
        config.update(
            units=self.units,
            interpolation=self.interpolation,
            return_sequences=self.return_sequences,
        )
        return config


class _Controlled(keras.layers.Layer):
    """`dz/ds = f(z) dX/ds` in one piece of the path, `args` being the coefficients of `dX/ds`."""

    def __init__(self, vector_field, units, **kwargs):
        super().__init__(**kwargs)
        self.vector_field = vector_field
        self.units = units

    def build(self, s_shape, z_shape):
        """Nothing: the field builds itself when it is called."""

    def call(self, s, z, args):
        matrix, channels = self.vector_field(z), args.shape[-1]
        if matrix.shape[1:] not in ((self.units, channels), (self.units * channels,)):
            raise ValueError(
                "The field of a controlled equation must return a matrix with a row for each unit and a column for "
                f"time and each channel, (batch, {self.units}, {channels}) or (batch, {self.units * channels}). "
                f"Received: shape={tuple(matrix.shape)} from {self.vector_field!r}"
            )
        matrix = ops.reshape(ops.cast(matrix, z.dtype), (-1, self.units, channels))
        return ops.sum(matrix * polynomial(args, s)[:, None], axis=-1)


class _Cell(keras.layers.Layer):
    """Moves the state along one piece of the path."""

    is_nested, dropout_cells = False, ()

    def __init__(self, field, units, options, **kwargs):
        super().__init__(**kwargs)
        self.field = field
        self.state_size = units
        self.options = options
        self.gradient, self.jit_compile, self.statistics = options.gradient, options.jit_compile, options.metrics

    def call(self, rates, states, training=None):
        return self.advance(rates, states, training, lambda *args, **options: self.solve(*args, **options).ys[-1])

    def advance(self, rates, states, training, move):
        z = move(states[0], [0.0, 1.0], args=rates, training=training)
        return z, [z]

    def solve(self, y0, ts, **options):
        own = {"solver": for_short_intervals(self.options.solver, self.gradient)}
        return self.options.solve(self.field, y0, ts, **{**own, **options})
