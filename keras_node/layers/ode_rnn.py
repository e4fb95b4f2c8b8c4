"""A recurrent layer for series that are observed at irregular times."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_node.autograph import without_autograph
from keras_node.layers.irregular_times import as_array, check_order, check_steps, elapsed_times
from keras_node.layers.ode_rnn_cell import ODERNNCell
from keras_node.layers.series import SeriesRNN
from keras_node.nested_layers import keep_frozen
from keras_node.solve_options import Gradient, Solver, SolvingLayer
from keras_node.times import prepare_times

_RNN_OPTIONS = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")


@keras.saving.register_keras_serializable(package="keras_node")
class ODERNN(SolvingLayer):
    """Runs a recurrent cell over a series whose observations come at irregular times.

    Between two observations the state follows an ODE. At each observation `x[i]`, made at time `t[i]`, the cell
    updates the state:

    `h' = h[i - 1] + integral of f(t, h(t)) dt from 0 to t[i] - t[i - 1]`

    `output[i], h[i] = cell(x[i], h')`

    The initial state is the state at the first observation of a sample. If single channels are missing, give the cell
    zeros for them, together with further channels that say which ones were observed, and mask the steps at which
    nothing was observed. See the second example.

    Args:
        cell: the Keras cell that processes an observation: a `SimpleRNNCell`, `GRUCell`, `LSTMCell`, your own layer, or
            a list of cells, which are stacked.
        vector_field: the field that moves the state, a Keras layer or model, or a registered callable. It takes `(h)`
            or `(t, h)`. `t` is the time since the last observation.
        solver: as in `keras_node.ODELayer`. An adaptive solver tries the whole interval up to an observation first,
            unless it has a `first_step` or the gradient is `"direct"`.
        gradient: as in `keras_node.ODELayer`.
        evolve: which states of the cell the ODE moves, an index or a tuple of indices (see `keras_node.ODERNNCell`).
            Defaults to the first: `h` of an `LSTMCell` moves, and its memory `c` stays (ODE-LSTM).
        time_feature: whether the times are the last channel of `x`, which the cell does not see, instead of the
            argument `times`. Use it in wrappers that take one tensor, such as `keras.layers.Bidirectional`. Defaults
            to `False`.
        return_sequences: whether to return the output of every step instead of only the last one. Defaults to `False`.
        return_state: whether to return the last states as well. Defaults to `False`.
        go_backwards: whether to process the series from its last step to its first. Time then runs backward too:
            intervals are negative, and each solve goes from an observation to the one before it. Outputs come in the
            order of processing. A field that contracts forward in time expands backward in time. Defaults to `False`.
        stateful: whether to keep the states and their times for the next batch, which continues the series of this
            one. Defaults to `False`.
        unroll: whether to unroll the loop over the steps. Defaults to `False`.
        zero_output_for_mask: whether the output of a masked step is zero instead of the output of the step before.
            Defaults to `False`.
        jit_compile: as in `keras_node.ODELayer`, for the loop over the steps with all its solves.
        track_stats: as in `keras_node.ODELayer`, but for forward solves only. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name`. `dtype` defaults to that of the cell.

    Call arguments:
        x: the observations, `(batch, T, features)`.
        times: the times of the observations, `(batch, T)`, in any unit. They must not decrease from one observation to
            the next. Only their differences matter. But a Keras model takes its inputs in float32, where seconds since
            1970 lose all digits below 128: count from an origin close to them.
        mask: boolean, `(batch, T)`; false where there is no observation. By default the mask that a layer such as
            `Masking` or `Embedding` gave to `x`.
        initial_state: list of the states of the cell at the first observation. Defaults to the initial states of the
            cell, usually zeros.
        training: Python boolean, passed to the field and the cell.
        x_mask: Keras passes the mask of `x` here; pass `mask` instead.

    Input shape:
        `(batch, T, features)`, or `(batch, T, features + 1)` with `time_feature`.

    Output shape:
        `(batch, units)`, or `(batch, T, units)` with `return_sequences`. With `return_state`, a tuple of this and of
        each state, `(batch, units)`.

    Masking:
        A masked step is not an observation: the values of `x` and `times` there have no effect, and the state stays as
        it was. The next observation gets the whole interval since the last one. Padding does not count in the error
        that the solver controls. With `return_sequences` the output carries the mask.

    Raises:
        ValueError: for inputs of another shape, and for times that decrease.
        tf.errors.InvalidArgumentError: in a graph, for times that decrease, and if a solve fails. In a model
            that is compiled with XLA nothing can raise; the results of that sample are NaN instead.

    Example:
        >>> field = keras.Sequential([keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(8)])
        >>> layer = keras_node.ODERNN(keras.layers.GRUCell(8), field)
        >>> x = keras.random.normal((2, 5, 3))
        >>> times = keras.ops.cumsum(keras.random.uniform((2, 5)), axis=1)
        >>> layer(x, times).shape
        TensorShape([2, 8])

        With missing channels (here wherever `x` is negative):

        >>> observed = x > 0
        >>> layer = keras_node.ODERNN(keras.layers.GRUCell(8), field, return_sequences=True)
        >>> channels = [keras.ops.where(observed, x, 0.0), keras.ops.cast(observed, "float32")]
        >>> y = layer(keras.ops.concatenate(channels, axis=-1), times, mask=keras.ops.any(observed, axis=-1))
        >>> y.shape
        TensorShape([2, 5, 8])

    Reference:

        - Rubanova, Chen & Duvenaud (2019), "Latent ODEs for Irregularly-Sampled Time Series", arXiv:1907.03907,
          section 3.
        - Lechner & Hasani (2020), "Learning Long-Term Dependencies in Irregularly-Sampled Time Series",
          arXiv:2006.04418.
    """

    nested: ClassVar = {"cell": "cell.cell", "vector_field": "cell.vector_field"}

    def __init__(
        self,
        cell: keras.Layer | list[keras.Layer] | tuple[keras.Layer, ...],
        vector_field: keras.Layer | Callable,
        *,
        solver: Solver = "tsit5",
        gradient: Gradient | None = None,
        evolve: int | Sequence[int] | None = None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        time_feature: bool = False,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        **kwargs: Any,
    ) -> None:
        cell = keras.layers.StackedRNNCells(cell) if isinstance(cell, list | tuple) else cell
        # Without autocast, times keep their digits under a mixed policy.
        policy = cell.dtype_policy if isinstance(cell, keras.Layer) else None
        super().__init__(autocast=False, **{"dtype": policy, **kwargs})
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
        self.options = cell.options
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
        keep_frozen(self)

    @without_autograph
    def __call__(self, x: Any, times: Any = None, *args: Any, **kwargs: Any) -> Any:
        check_steps(x, self)
        return super().__call__(x, as_array(times), *args, **kwargs)

    def build(self, x_shape: tuple) -> None:
        if len(x_shape) != 3 or x_shape[-1] <= self.time_feature:
            raise ValueError(
                "`x` must be of shape (batch, T, features), or (batch, T, features + 1) with `time_feature`. "
                f"Received: x.shape={tuple(x_shape)}, time_feature={self.time_feature}"
            )
        batch, steps, channels = x_shape
        self.rnn.build((batch, steps, channels + 1 - self.time_feature))
        if self.stateful:
            self._last_times = _LastTimes(batch)

    def call(
        self,
        x: tf.Tensor,
        times: Any = None,
        mask: tf.Tensor | None = None,
        initial_state: list | None = None,
        training: bool | None = None,
        x_mask: tf.Tensor | None = None,
    ) -> Any:
        x, times = self._observations(x, times)
        mask = x_mask if mask is None else mask
        if mask is not None:
            # Padding may hold any value, and the gradient of a masked NaN would still be NaN.
            mask = ops.cast(mask, "bool")
            if not tf.TensorShape(mask.shape).is_compatible_with(x.shape[:2]):
                raise ValueError(
                    "`mask` must be of shape (batch, T), with one entry for every step of `x`. "
                    f"Received: mask.shape={tuple(mask.shape)} with x.shape={tuple(x.shape)}"
                )
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
            # After times that decrease, an infinite time makes this sample NaN in the next batch as well.
            self.last_time.assign(ops.cast(ops.where(ordered, end, float("inf")), "float64"))

        def spoil(y: tf.Tensor) -> tf.Tensor:
            return ops.where(ops.reshape(ordered, [-1] + [1] * (len(y.shape) - 1)), y, float("nan"))

        return keras.tree.map_structure(spoil, outputs)

    def _observations(self, x: tf.Tensor, times: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the observations in the layer's precision, and times in a precision in which they differ."""
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
                "`times` must be of shape (batch, T), with one time for every step of `x`. "
                f"Received: times.shape={tuple(times.shape)} with x.shape={tuple(x.shape)}"
            )
        return ops.cast(x, self.variable_dtype), times

    def compute_output_shape(self, x_shape: tuple) -> Any:
        return self.rnn.compute_output_shape(x_shape)

    def compute_mask(self, x: Any, mask: Any) -> Any:
        return self.rnn.compute_mask(x, mask)

    # `keras.layers.Bidirectional` needs the following attributes.

    @property
    def cell(self) -> ODERNNCell:
        return self.rnn.cell

    @property
    def vector_field(self) -> Any:
        """The field by which the state moves between observations."""
        return self.cell.vector_field

    @property
    def states(self) -> Any:
        return self.rnn.states

    @property
    def last_time(self) -> keras.Variable:
        """The times of the states of a stateful layer, NaN before the first observation of a sample."""
        return self._last_times.last_time

    @property
    def return_sequences(self) -> bool:
        return self.rnn.return_sequences

    @property
    def return_state(self) -> bool:
        return self.rnn.return_state

    @property
    def go_backwards(self) -> bool:
        return self.rnn.go_backwards

    @property
    def stateful(self) -> bool:
        return self.rnn.stateful

    @property
    def zero_output_for_mask(self) -> bool:
        return self.rnn.zero_output_for_mask

    @zero_output_for_mask.setter
    def zero_output_for_mask(self, value: bool) -> None:
        self.rnn.zero_output_for_mask = value

    def get_initial_state(self, batch_size: int | tf.Tensor) -> Any:
        return self.rnn.get_initial_state(batch_size)

    def reset_state(self) -> None:
        """Forgets the states of a stateful layer and their times."""
        self.rnn.reset_state()
        if self.built and self.stateful:
            self.last_time.assign(ops.full_like(self.last_time, float("nan")))

    def load_own_variables(self, store: Any) -> None:
        """Reads nothing. Files of earlier versions hold the times of states, without the states."""

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        rnn = self.rnn.get_config()
        for name in _RNN_OPTIONS:
            config[name] = rnn[name]
        config.update(evolve=self.cell.evolve, time_feature=self.time_feature)
        return config


class _LastTimes(tf.Module):
    """Holds the times of states. Keras saves and copies neither states nor these, because they are no weights."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        never = keras.initializers.Constant(float("nan"))
        self.last_time = keras.Variable(never, (batch,), "float64", trainable=False, name="last_time")
