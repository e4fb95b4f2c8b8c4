"""A recurrent layer for series observed at irregular times."""

from typing import ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_node.layers.irregular_times import as_array, check_order, check_steps, elapsed_times
from keras_node.layers.ode_rnn_cell import ODERNNCell
from keras_node.layers.series import SeriesRNN
from keras_node.solve_options import SolvingLayer
from keras_node.times import prepare_times

_RNN_OPTIONS = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")


@keras.saving.register_keras_serializable(package="keras_node")
class ODERNN(SolvingLayer, keras.layers.Layer):
    """Runs a recurrent cell over a series whose observations come at times of their own.

    Between two observations the state follows an ODE, and the cell takes in each observation `x[i]`, made at `t[i]`:

    `h' = h[i - 1] + integral of f(t, h(t)) dt from 0 to t[i] - t[i - 1]`

    `output[i], h[i] = cell(x[i], h')`

    A masked step is no observation: it changes nothing, and its time passes with the next step's interval. The initial
    state is that at a sample's first observation.

    Args:
        cell: the Keras cell that takes in an observation: a `SimpleRNNCell`, `GRUCell`, `LSTMCell`, your own layer, or
            a list of them to be stacked.
        vector_field: what moves the state: a Keras layer or model, or a registered callable, `(h)` or `(t, h)`. `t` is
            the time since the last observation.
        solver: as in `keras_node.ODELayer`. An adaptive one attempts the whole way to an observation first, unless it
            has a `first_step` or the gradient is `"direct"`.
        gradient: as in `keras_node.ODELayer`.
        evolve: which of the cell's states move, an index or several (see `keras_node.ODERNNCell`). Defaults to the
            first: `h` of an `LSTMCell` moves and its memory `c` stays (ODE-LSTM).
        time_feature: whether the times are the last channel of `x`, which the cell does not see, rather than `times`.
            For wrappers that take one tensor, such as `keras.layers.Bidirectional`. Defaults to `False`.
        return_sequences: whether to return the output of every step, or the last one. Defaults to `False`.
        return_state: whether to return the last states as well. Defaults to `False`.
        go_backwards: whether to go through the series from its last step to its first, in real time: intervals are
            negative, and the solve from one observation to the one before it runs backwards in time. Outputs come in
            the order of processing. A field that contracts forwards expands backwards. Defaults to `False`.
        stateful: whether states, and the times that they belong to, are kept for the next batch, whose samples go
            on where those of this one ended. Defaults to `False`.
        unroll: whether to unroll the loop over steps. Defaults to `False`.
        zero_output_for_mask: whether the output of a masked step is zero, or that of the step before. Defaults to
            `False`.
        jit_compile: as in `keras_node.ODELayer`, for the loop over the steps with all its solves.
        track_stats: as in `keras_node.ODELayer`, of the forward solves. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name`. `dtype` defaults to the cell's.

    Call arguments:
        x: the observations, `(batch, T, features)`.
        times: when they were made, `(batch, T)`, in any unit. From one observation to the next they must not decrease.
        mask: boolean, `(batch, T)`; false where there is no observation. What `x` and `times` hold there has no
            effect. By default the mask that a layer such as `Masking` or `Embedding` gave to `x`.
        initial_state: list of the cell's states at the first observation. Zeros by default.
        training: Python boolean, handed on to the field and the cell.
        x_mask: filled in by Keras with the mask of `x`; pass `mask` instead.

    Input shape:
        `(batch, T, features)`, or `(batch, T, features + 1)` with `time_feature`.

    Output shape:
        `(batch, units)`, or `(batch, T, units)` with `return_sequences`; with `return_state`, a tuple of this and of
        every state, `(batch, units)`.

    Times that decrease raise `ValueError`, in a graph `tf.errors.InvalidArgumentError`. Under XLA, where nothing can
    raise, all results are NaN for that sample.

    Where single channels are missing, give the cell a zero for them and, as further channels, which ones were
    observed; mask the steps at which none was. See the second example.

    Example:
    >>> field = keras.Sequential([keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(8)])
    >>> layer = keras_node.ODERNN(keras.layers.GRUCell(8), field)
    >>> x = keras.random.normal((2, 5, 3))
    >>> times = keras.ops.cumsum(keras.random.uniform((2, 5)), axis=1)
    >>> layer(x, times).shape
    TensorShape([2, 8])

    With missing channels, here wherever `x` is negative:

    >>> observed = x > 0
    >>> layer = keras_node.ODERNN(keras.layers.GRUCell(8), field, return_sequences=True)
    >>> channels = [keras.ops.where(observed, x, 0.0), keras.ops.cast(observed, "float32")]
    >>> y = layer(keras.ops.concatenate(channels, axis=-1), times, mask=keras.ops.any(observed, axis=-1))
    >>> y.shape
    TensorShape([2, 5, 8])

    Reference:

    - Rubanova, Chen & Duvenaud (2019), "Latent ODEs for Irregularly-Sampled Time Series".
    - Lechner & Hasani (2020), "Learning Long-Term Dependencies in Irregularly-Sampled Time Series".
    """

    nested: ClassVar = {"cell": "cell.cell", "vector_field": "cell.vector_field"}

    def __init__(
        self,
        cell,
        vector_field,
        *,
        solver="tsit5",
        gradient="backsolve",
        evolve=None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        time_feature: bool = False,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        **kwargs,
    ):
        cell = keras.layers.StackedRNNCells(cell) if isinstance(cell, list | tuple) else cell
        # The input is not cast: times must not lose their digits under a mixed policy.
        super().__init__(autocast=False, **{"dtype": getattr(cell, "dtype_policy", None), **kwargs})
        cell = ODERNNCell(
            cell,
            vector_field,
            solver=solver,
            gradient=gradient,
            evolve=evolve,
            jit_compile=jit_compile,
            track_stats=track_stats,
            name=f"{self.name}_cell",
        )
        self.time_feature = time_feature
        self.supports_masking = True
        self.rnn = SeriesRNN(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            zero_output_for_mask=zero_output_for_mask,
            autocast=False,
            dtype=self.dtype_policy,
            name="rnn",
        )

    def __call__(self, x, times=None, *args, **kwargs):
        check_steps(x, self)
        return super().__call__(x, as_array(times), *args, **kwargs)

    def build(self, x_shape):
        if len(x_shape) != 3 or x_shape[-1] <= self.time_feature:
            raise ValueError(
                "`x` must be (batch, T, features), with `time_feature` (batch, T, features + 1). "
                f"Received: x.shape={tuple(x_shape)}, time_feature={self.time_feature}"
            )
        batch, steps, channels = x_shape
        self.rnn.build((batch, steps, channels + 1 - self.time_feature))
        if self.stateful:
            # The time that the state belongs to; NaN before a sample's first observation.
            self.last_time = self.add_weight(
                shape=(batch,), dtype="float64", initializer=_not_a_number, trainable=False, name="last_time"
            )

    def call(self, x, times=None, mask=None, initial_state=None, training=None, x_mask=None):
        x, times = self._observations(x, times)
        mask = x_mask if mask is None else mask
        if mask is not None:
            # Padding may hold anything, and the gradient of a masked NaN would still be NaN.
            mask = ops.cast(mask, "bool")
            x = ops.where(ops.expand_dims(mask, -1), x, 0)
        goes_on = self.stateful and initial_state is None
        start = ops.cast(self.last_time, times.dtype) if goes_on else None
        elapsed, end = elapsed_times(times, mask, start, self.go_backwards)
        ordered = ops.all(ops.isfinite(elapsed) & (elapsed <= 0 if self.go_backwards else elapsed >= 0), axis=1)
        with tf.control_dependencies(check_order(ordered, times, self)):
            elapsed = ops.cast(ops.where(ordered[:, None], elapsed, 0), x.dtype)

        inputs = ops.concatenate([x, ops.expand_dims(elapsed, -1)], axis=-1)
        outputs = self.rnn(inputs, initial_state=initial_state, mask=mask, training=training)
        if self.stateful:
            # An infinite time spoils this sample's next batch as well.
            self.last_time.assign(ops.cast(ops.where(ordered, end, float("inf")), "float64"))

        def spoil(y):
            return ops.where(ops.reshape(ordered, [-1] + [1] * (len(y.shape) - 1)), y, float("nan"))

        return keras.tree.map_structure(spoil, outputs)

    def _observations(self, x, times):
        """The observations in the layer's precision, and their times in a precision that tells them apart."""
        if self.time_feature == (times is not None):
            raise ValueError(
                "Pass `times`, or set `time_feature=True` if they are the last channel of `x`; not both. "
                f"Received: times={times}, time_feature={self.time_feature}"
            )
        if self.time_feature:
            x, times = x[..., :-1], x[..., -1]
        times = prepare_times(times, self.variable_dtype)
        expected = tf.TensorShape(x.shape[:2])
        if len(times.shape) != 2 or not expected.is_compatible_with(times.shape):
            raise ValueError(
                "`times` must be (batch, T), one time for every step of `x`. "
                f"Received: times.shape={tuple(times.shape)} with x.shape={tuple(x.shape)}"
            )
        return ops.cast(x, self.variable_dtype), times

    def compute_output_shape(self, x_shape):
        return self.rnn.compute_output_shape(x_shape)

    def compute_mask(self, x, mask):
        return self.rnn.compute_mask(x, mask)

    # What `keras.layers.Bidirectional` asks of a layer.

    @property
    def cell(self):
        return self.rnn.cell

    @property
    def options(self):
        return self.rnn.cell.options

    @property
    def states(self):
        return self.rnn.states

    @property
    def return_sequences(self):
        return self.rnn.return_sequences

    @property
    def return_state(self):
        return self.rnn.return_state

    @property
    def go_backwards(self):
        return self.rnn.go_backwards

    @property
    def stateful(self):
        return self.rnn.stateful

    @property
    def zero_output_for_mask(self):
        return self.rnn.zero_output_for_mask

    @zero_output_for_mask.setter
    def zero_output_for_mask(self, value):
        self.rnn.zero_output_for_mask = value

    def get_initial_state(self, batch_size):
        return self.rnn.get_initial_state(batch_size)

    def reset_state(self):
        """Forgets the states, and the times that they belong to, of a stateful layer."""
        self.rnn.reset_state()
        if self.built and self.stateful:
            self.last_time.assign(_not_a_number(self.last_time.shape))

    def get_config(self):
        config = super().get_config()
        rnn = self.rnn.get_config()
        for name in _RNN_OPTIONS:
            config[name] = rnn[name]
        config.update(evolve=self.cell.evolve, time_feature=self.time_feature)
        return config


def _not_a_number(shape, dtype=None):
    return ops.full(shape, float("nan"), dtype=dtype)
