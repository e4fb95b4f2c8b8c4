"""A model that learns dynamics from trajectories, and forecasts."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.arguments import number, one_of, positive_integer
from keras_node.autograph import without_autograph
from keras_node.control import ControlPath, control_path
from keras_node.layers.call_times import shape_of, times_first
from keras_node.models.likelihood_model import LikelihoodModel
from keras_node.models.scaled_network import ScaledNetwork
from keras_node.models.trajectories import (
    Trajectories,
    are_arrays,
    arrays_for_keras,
    as_dictionary,
    center_and_scale,
    dictionary_of_arrays,
    prepare,
    until,
    windows,
)
from keras_node.models.window_states import WindowStates, gaps
from keras_node.nested_layers import keep_frozen
from keras_node.signatures import build, call_arguments
from keras_node.solve_options import Gradient, Solver, SolvingLayer

_INTERPOLATIONS = ("hermite", "linear")
_INITIAL_STATES = ("observed", "trained")
_NO_LIMIT = 2**30  # of the horizon


@keras.saving.register_keras_serializable(package="keras_node")
class DynamicsModel(SolvingLayer, LikelihoodModel):
    """Learns a vector field from trajectories that were observed at regular or irregular times, and forecasts.

    `dy/dt = f(t, y)`

    `loss = mean of ((y(t[i]) - values[i]) / scale)^2`

    The mean is over what was observed, and `scale` is the standard deviation of each channel. The model measures it,
    and the mean, when it is trained for the first time (see `adapt`).

    A solve over a whole long trajectory ("single shooting") often does not train: as soon as the path has lost its
    phase, the mean of the data is the best that a small change of the weights can reach. There are three remedies,
    which you can combine:

    - `window`: cut trajectories into windows of so many intervals, each with its own initial state.
    - `initial_states="trained"` and `continuity`: train the initial state of every window together with the field, and
      add the squared gap between the end of a window and the start of the next one to the loss ("multiple shooting").
      Trained states also remove the noise of observed ones.
    - `keras_node.GrowingHorizon`: a callback that begins with a short part of each window.

    `fit(x)` takes no targets: `x` is `(times, values)`, `(times, values, mask)` or a dictionary with these keys, and
    these optional ones: `controls`, known inputs of the system, from which the field receives a
    `keras_node.ControlPath` as its `args`; and `jump_times` with `jump_amounts`, known jumps of the state, such as
    doses. The same holds for `validation_data`, `evaluate` and `predict`. A `tf.data.Dataset` yields `(x,)`, where `x`
    is a dictionary, and needs a call of `adapt` before. With `sample_weight`, one number for each trajectory, the loss
    is the sum of the weighted losses, divided by the number of trajectories. The logs have `loss`; the mean squared
    error `mse`, in the units of the values; and with `continuity` the mean squared `gap` in units of `scale`.

    `evaluate` and validation compute the same loss, for windows that begin at observed states, over their whole length.
    After `fit`, an exported model takes a dictionary with the keys of its training data.

    Args:
        vector_field: the field `f`, a Keras layer or model such as `keras_node.GreyBoxField`, or a registered callable.
            It takes `(y)`, `(t, y)` or `(t, y, args)`. Defaults to a network with two hidden layers whose input and
            output are in units of `scale`.
        units: width of the hidden layers of the default network. Defaults to `64`.
        window: number of intervals in a window, a positive integer. Defaults to `None`, for whole trajectories.
        initial_states: where windows begin in training: `"observed"` (default), at the first observation, where missing
            channels are filled in linearly; or `"trained"`, at a state of their own. The model has one such state for
            each window of the training data, which must be arrays then.
        continuity: weight of the mean squared gap between windows, 0 or more; it needs `initial_states="trained"`.
            Defaults to `0.0`.
        interpolation: the path through the controls, `"hermite"` (default) or `"linear"`, see
            `keras_node.control_path`.
        solver: as in `keras_node.ODELayer`. Defaults to `"tsit5"`.
        gradient: as in `keras_node.ODELayer`. Defaults to `None`.
        jit_compile: as in `keras_node.ODELayer`. Defaults to `"auto"`.
        track_stats: as in `keras_node.ODELayer`. Defaults to `False`.
        **kwargs: arguments of `keras.Model`, such as `name` and `dtype`.

    Call arguments:
        inputs: trajectories, as above.
        training: Python boolean, passed to the field.

    Input shape:
        `times`: `(batch, T)`, or `(T,)` if all trajectories share them, in any unit; they must not decrease from one
        observation to the next. `values`: `(batch, T, D)`, where a NaN is a missing value. `mask`: `(batch, T)` or
        `(batch, T, D)`, false for a missing value. `controls`: `(batch, T, C)`, at the same times. `jump_times`:
        `(batch, J)`, and `jump_amounts`: `(batch, J, D)`. Keras hands arrays to a model in float32, so `fit`,
        `evaluate` and `predict` refuse arrays of times that this would bring closer or farther apart, such as seconds
        since 1970: count these from an origin close to them.

    Output shape:
        `(batch, T, D)`: the states at all `times`, from the first observation on.

    Masking:
        The mask is an input. What was not observed has no effect on the loss. If the time of a step without
        observations is earlier than that of a step before it, as in padding with zeros, the output repeats the latest
        state so far. The model neither reads nor returns a Keras mask.

    Raises:
        ValueError: for an option out of range, for data of another shape, and for targets.
        tf.errors.InvalidArgumentError: if a solve fails. In a model that is compiled with XLA nothing can raise; the
            states are NaN instead.

    Example:
        Predators and prey. Two of the four rates of their equations are known, and the others are trained:

        >>> def lotka_volterra(y, growth, decline):
        ...     prey, predators = y[..., :1], y[..., 1:]
        ...     meetings = prey * predators
        ...     return keras.ops.concatenate([growth * prey - meetings, meetings - decline * predators], axis=-1)
        >>> field = keras_node.GreyBoxField(lotka_volterra, {"growth": 1.0, "decline": 1.0})
        >>> times, values = keras.ops.linspace(0.0, 10.0, 51), keras.random.uniform((4, 51, 2), 0.5, 2.0)
        >>> model = keras_node.DynamicsModel(field, window=10, initial_states="trained", continuity=1.0)
        >>> model.compile("adam")
        >>> history = model.fit((times, values), epochs=2, verbose=0)
        >>> sorted(history.history)
        ['gap', 'loss', 'mse']
        >>> model.forecast(values[:, -1], [10.0, 11.0, 12.0]).shape
        TensorShape([4, 3, 2])

    Reference:

        - Bock (1983), "Recent advances in parameter identification techniques for ODE", and Turan & Jaeschke (2021),
          "Multiple shooting for training neural differential equations on time series", arXiv:2109.06786.
        - Rackauckas et al. (2020), "Universal Differential Equations for Scientific Machine Learning",
          arXiv:2001.04385, on growing horizons and partly known fields.
    """

    measures = ("mse",)
    built: bool

    def __init__(
        self,
        vector_field: keras.Layer | Callable | None = None,
        *,
        units: int = 64,
        window: int | None = None,
        initial_states: str = "observed",
        continuity: float = 0.0,
        interpolation: str = "hermite",
        solver: Solver = "tsit5",
        gradient: Gradient | None = None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        # Without autocast, times and states keep their digits under a mixed policy.
        super().__init__(autocast=False, **kwargs)
        self.units = positive_integer("units", units)
        self.window = None if window is None else positive_integer("window", window)
        self.initial_states = one_of("initial_states", initial_states, _INITIAL_STATES)
        self.interpolation = one_of("interpolation", interpolation, _INTERPOLATIONS)
        self.continuity = number("continuity", continuity)
        if self.continuity < 0 or (self.continuity and initial_states != "trained"):
            raise ValueError(
                'A `continuity` of 0 or more needs `initial_states="trained"`: the gap to an observed state is in the '
                f"loss already. Received: continuity={continuity}, initial_states={initial_states!r}"
            )
        # Keras orders weights by the layers as they are set. The field may come later, so it comes last.
        self.scaled_states = WindowStates(name="window_states") if initial_states == "trained" else None
        self.vector_field = vector_field
        self.set_options(solver, gradient, jit_compile, track_stats)
        if self.continuity:
            self.trackers.append(keras.metrics.Mean(name="gap"))
        self._num_controls: int | None = None

    # For a model, `jit_compile` is the option of `compile`, for the whole model.
    jit_compile = keras.Model.jit_compile

    @property
    def jit_compile_solves(self) -> bool | str:
        return self.options.jit_compile

    @property
    def window_states(self) -> tf.Tensor:
        """The trained initial states of the windows of the training data, `(N, windows, D)`, in the units of values."""
        if self.scaled_states is None or not self.scaled_states.built:
            raise ValueError(
                'Only a model with `initial_states="trained"` that has been trained has states of windows. '
                f"Received: a model with initial_states={self.initial_states!r}"
            )
        return self.center + self.scale * self.scaled_states.states

    def build(self, inputs_shape: Any) -> None:
        self.inputs_shape = inputs_shape
        shapes = as_dictionary(inputs_shape)
        self._build_for(shapes["values"][-1], shapes["controls"][-1] if "controls" in shapes else 0)

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        trajectories = self._prepared(inputs, keep_times=True)
        return ops.cast(self._follow(trajectories.values[:, 0], trajectories, training), self.compute_dtype)

    def adapt(self, x: Any) -> None:
        """Measures the mean and the standard deviation of each channel, as `fit` does the first time.

        Args:
            x: trajectories, as arrays.
        """
        x = dictionary_of_arrays(x, self)
        self.build({name: part.shape for name, part in x.items()})
        center, scale = center_and_scale(x)
        for scaled in (self, self.vector_field) if isinstance(self.vector_field, ScaledNetwork) else (self,):
            scaled.center.assign(center)
            scaled.scale.assign(scale)
        self.is_adapted.assign(True)

    @without_autograph
    def forecast(self, y0: Any, times: Any, args: Any = None, jumps: Any = None) -> tf.Tensor:
        """Returns the states at given times.

        Args:
            y0: the states at the first of `times`, `(batch, D)`.
            times: `(T,)`, or `(batch, T)`; monotonic.
            args: what a field `f(t, y, args)` receives, such as a `keras_node.ControlPath`. Defaults to `None`.
            jumps: a pair of times `(batch, J)` and amounts `(batch, J, D)`. Defaults to `None`.

        Returns:
            The states, `(batch, T, D)`. The first of them is `y0`.
        """
        y0 = ops.convert_to_tensor(y0, self.variable_dtype)
        dim = self.center.shape[0] if self.built else None
        if not tf.TensorShape((None, dim)).is_compatible_with(y0.shape):
            raise ValueError(f"`y0` must be of shape (batch, {dim or 'D'}). Received: y0 of shape {tuple(y0.shape)}")
        self._build_for(y0.shape[-1], _number_of(args))
        return ops.cast(self._solve(y0, times, args, jumps), self.compute_dtype)

    def forecast_errors(self, x: Any, horizon: int | None = None) -> np.ndarray:
        """Returns how the error of forecasts grows with the number of steps ahead.

        Args:
            x: trajectories.
            horizon: the number of steps to forecast. Forecasts begin at every `horizon`-th step, at the observed state.
                Defaults to `None`, for whole trajectories.

        Returns:
            The root mean square of the errors, `(horizon, D)`, in the units of the values. Row `i` is for `i + 1` steps
            ahead. It is NaN where nothing was observed.
        """
        trajectories = self._prepared(x)
        steps = trajectories.times.shape[1]
        cut, _ = windows(trajectories, steps - 1 if horizon is None else positive_integer("horizon", horizon))
        errors = self._follow(cut.values[:, 0], cut) - cut.values
        observed = ops.cast(cut.observed, errors.dtype)
        squares = np.sum(observed * errors**2, axis=0)[1:]
        counts = np.sum(observed, axis=0)[1:]
        return np.sqrt(np.divide(squares, counts, out=np.full_like(squares, np.nan), where=counts > 0))

    @without_autograph
    def sample_losses(self, x: Any, y: Any, y_pred: Any, training: bool) -> tuple[tf.Tensor, dict[str, tuple]]:
        """Returns the loss of each trajectory, `(batch,)`, and the errors that the metrics report."""
        _refuse_targets(y)
        trajectories = self._prepared(x)
        length = self.window or ops.shape(trajectories.times)[1] - 1
        cut, number_of_windows = windows(trajectories, length)
        is_seen = ops.any(cut.observed, axis=(1, 2))
        trained = self.scaled_states if training else None
        if training:
            cut = until(cut, self.horizon)
        starts = cut.values[:, 0]
        if trained is not None:
            starts = self.center + self.scale * trained.take(trajectories.index, number_of_windows)
        states = self._follow(starts, cut, training)
        errors = states - cut.values
        # An observed initial state has no error.
        counted = cut.observed if trained is not None else cut.observed & (ops.arange(length + 1) > 0)[:, None]
        # What was not observed, or what a shorter horizon does not reach, may be anything.
        errors = ops.where(counted, errors, 0)

        def by_trajectory(a: tf.Tensor) -> tf.Tensor:
            return ops.reshape(a, (-1, number_of_windows * (length + 1), a.shape[-1]))

        squares, counts = by_trajectory(errors**2), by_trajectory(ops.cast(counted, errors.dtype))
        total = ops.sum(squares / self.scale**2, axis=(1, 2))
        losses = tf.math.divide_no_nan(total, ops.sum(counts, axis=(1, 2)))
        measures = {"mse": (squares, counts)}
        if self.continuity:
            squares, known = gaps(states[:, -1] / self.scale, starts / self.scale, is_seen, number_of_windows)
            reached = ops.cast(self.horizon >= length, squares.dtype) if training else 1
            known = known * reached
            mean = tf.math.divide_no_nan(ops.sum(known * squares, axis=(1, 2)), ops.sum(known, axis=(1, 2)))
            losses += self.continuity * mean if trained is not None else 0
            measures["gap"] = squares, known
        return losses, measures

    def prepare_data(self, arguments: dict[str, Any], trains: bool) -> dict[str, Any]:
        """Makes dictionaries of arrays, and what a model needs to know of them before it is trained."""
        x, validation_data = arguments.get("x"), arguments.get("validation_data")
        if trains:
            _refuse_targets(arguments.get("y"))
        if are_arrays(x):
            x = arrays_for_keras(x, self)
            if trains:
                with self.distribute_strategy.scope():
                    self._meet(x)
                if self.scaled_states is not None:
                    x = {**x, "index": np.arange(len(x["values"]), dtype="int32")}
        others: Sequence = ()
        if isinstance(validation_data, list | tuple) and (len(validation_data) == 1 or validation_data[1] is None):
            validation_data, *others = validation_data  # `(x,)`, `(x, None)` or `(x, None, sample_weight)`
        if are_arrays(validation_data):
            validation_data = (arrays_for_keras(validation_data, self), *others)
        known = {} if validation_data is None else {"validation_data": validation_data}
        return {**arguments, "x": x, **known}

    def _meet(self, x: dict[str, Any]) -> None:
        """Makes all weights for training data, and measures these the first time."""
        self.build({name: part.shape for name, part in x.items()})
        if not bool(self.is_adapted.numpy()):
            self.adapt(x)
        if self.scaled_states is not None:
            cut, _ = windows(self._prepared(x), self.window or x["values"].shape[1] - 1)
            observed = (cut.values[:, 0] - self.center) / self.scale
            self.scaled_states.begin_at(observed, len(x["values"]))

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Returns the states at all times from the first observation on, like `keras.Model.predict`."""
        if are_arrays(x):
            x = arrays_for_keras(x, self)
        return super().predict(x, *args, **kwargs)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> keras.KerasTensor:
        return keras.KerasTensor(tuple(as_dictionary(inputs)["values"].shape), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            units=self.units,
            window=self.window,
            initial_states=self.initial_states,
            continuity=self.continuity,
            interpolation=self.interpolation,
        )
        return config

    def get_build_config(self) -> dict[str, Any] | None:
        if not self.built:
            return None
        states = self.scaled_states
        shape = None if states is None or not states.built else tuple(states.states.shape)
        return {
            "dim": self.center.shape[0],
            "scaled_states": shape,
            "controls": self._num_controls,
            "inputs_shape": self.inputs_shape,
        }

    def build_from_config(self, config: dict[str, Any]) -> None:
        self.inputs_shape = config.get("inputs_shape")
        self._build_for(config["dim"], config.get("controls"))
        if self.scaled_states is not None and config["scaled_states"] is not None:
            self.scaled_states.build(tuple(config["scaled_states"]))
            self.scaled_states.built = True

    def _build_for(self, dim: int | None, num_controls: int | None = None) -> None:
        """Makes the weights for states of this length, and those of the field.

        Args:
            dim: length of the state.
            num_controls: the number of controls that the field receives, or `None` if that is not known.
        """
        if num_controls not in (None, self._num_controls) and not self._num_controls:
            self._num_controls = num_controls
            if self.built:
                self._build_field(dim)
        if self.built:
            return
        if dim is None:
            raise ValueError("The number of channels of `values` must be known. Received: values of shape (..., None)")
        self.center = self.add_weight(shape=(dim,), initializer="zeros", trainable=False, name="center")
        self.scale = self.add_weight(shape=(dim,), initializer="ones", trainable=False, name="scale")
        self.is_adapted = self.add_weight((), "zeros", "bool", trainable=False, name="is_adapted")
        no_limit = keras.initializers.Constant(_NO_LIMIT)
        self.horizon = self.add_weight((), no_limit, "int32", trainable=False, name="horizon")
        if self.vector_field is None:
            self.vector_field = ScaledNetwork(self.units, dim, dtype=self.dtype_policy)
        self._build_field(dim)
        self.built = True
        keep_frozen(self)

    def _build_field(self, dim: int | None) -> None:
        """Makes the weights of the field, unless it takes controls whose number is not known yet."""
        field, args = self.vector_field, None
        if not isinstance(field, keras.Layer):
            return
        takes_controls = call_arguments(field)[0] == 3
        if takes_controls and self._num_controls is None:
            return
        if takes_controls and self._num_controls:
            zeros = ops.zeros((1, 2, self._num_controls), self.variable_dtype)
            path = control_path([0.0, 1.0], zeros, interpolation=self.interpolation)
            args = tf.nest.map_structure(lambda x: keras.KerasTensor((None, *x.shape[1:]), dtype=x.dtype), path)
        t, y = (keras.KerasTensor((None, n), dtype=self.variable_dtype) for n in (1, dim))
        build(field, t, y, args)

    def _prepared(self, x: Any, keep_times: bool = False) -> Trajectories:
        trajectories = prepare(x, self, self.interpolation, keep_times)
        self._build_for(trajectories.values.shape[-1], _number_of(trajectories.controls))
        return trajectories

    def _follow(self, y0: tf.Tensor, trajectories: Trajectories, training: bool | None = False) -> tf.Tensor:
        """Returns the states at the times of the trajectories, `(batch, T, D)`."""
        return self._solve(y0, trajectories.times, trajectories.controls, trajectories.jumps or None, training)

    def _solve(self, y0: tf.Tensor, times: Any, args: Any, jumps: Any, training: bool | None = None) -> tf.Tensor:
        """Returns the states `(batch, T, D)`. Times and jumps have the axis of the batch first, or none."""
        dtype = self.variable_dtype
        times = times if len(shape_of(times)) == 1 else times_first(times, dtype)
        if jumps is not None:
            amounts = ops.moveaxis(ops.convert_to_tensor(jumps[1], dtype), 1, 0)
            jumps = times_first(jumps[0], dtype), amounts
        solution = self.options.solve(self.vector_field, y0, times, args=args, jumps=jumps, training=training)
        return ops.moveaxis(solution.ys, 0, 1)


def _refuse_targets(y: Any) -> None:
    if y is not None:
        received = f"y of shape {tuple(y.shape)}" if hasattr(y, "shape") else f"y={y!r}"
        raise ValueError(
            "A DynamicsModel learns from trajectories, without targets: call `fit(x)` with `x = (times, values)`, "
            f"`(times, values, mask)` or a dictionary. Received: {received}"
        )


def _number_of(controls: Any) -> int | None:
    """The number of controls in the arguments of a field, if these tell it."""
    if controls is None:
        return 0
    return controls.coefficients.shape[-1] if isinstance(controls, ControlPath) else None
