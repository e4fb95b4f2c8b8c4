"""A layer of continuous depth."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.arguments import non_negative_integer
from keras_node.signatures import build, call_arguments
from keras_node.solve_options import SolvingLayer
from keras_node.times import as_numbers, prepare_times


@keras.saving.register_keras_serializable(package="keras_node")
class ODELayer(SolvingLayer, keras.layers.Layer):
    """Integrates `dy/dt = f(t, y)` from its input.

    The output is the state at `t1`,

    `y(t1) = inputs + integral of f(t, y(t)) dt from t0 to t1`,

    or, where `ts` is given, the states at these times. It is a residual network of continuous depth; every sample
    of a batch follows the same field.

    Args:
        vector_field: what gives the rate of change: a Keras layer or model, or a callable registered with
            `keras.saving.register_keras_serializable`. Its arguments are `(y)`, `(t, y)` or `(t, y, args)`; it
            returns the shape of `y`. A functional model has the inputs `[t, y]` or `[t, y, args]`, and receives `t` in
            the shape of its input. Noise inside the field (dropout) is drawn once for a solve. State that it updates on
            every evaluation (BatchNormalization in training) is refused. A field that several layers share is saved
            once, so that Keras cannot load the model from a `.keras` file, as with its own wrappers: make the model in
            code and `load_weights`.
        t0: time of the input, a number. Defaults to `0.0`.
        t1: time of the output, a number, before or after `t0`. Defaults to `1.0`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"`.
        gradient: `"backsolve"` (default), `"checkpointed"`, `"direct"`, or an object such as
            `keras_node.BacksolveAdjoint()`.
        augment_dims: number of zeros appended to the last axis of the input, which let trajectories pass each
            other (augmented neural ODE). Defaults to `0`.
        jit_compile: whether to compile the solve with XLA even if the rest of the model is not compiled: `"auto"`
            (default) in training, but not with `"direct"` and, on a CPU, not with convolutions in the field; or `True`
            or `False`.
        track_stats: whether evaluations, steps, rejected steps and failures of the solves, forward and backward, are
            metrics of the model, in the logs of `fit` and `evaluate` (see `keras_node.SolverMonitor`). The name of the
            layer comes first in theirs: give layers that count different names, in nested models too. A call that does
            not say whether it is `training` counts nothing. Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: the state at `t0`, a float tensor `(batch, ...)`, or a nest (tuple, list, dict) of them.
        ts: times of the output, `(T,)`, or `(batch, T)` where every sample has its own; monotonic, from `t0` on.
            Numbers and arrays are constants, tensors and variables have gradients; for their precision see `odeint`.
        args: nest of tensors for a field `f(t, y, args)`. Numbers and NumPy arrays take the precision of the state.
        training: Python boolean, handed on to the field.
        mask: boolean, for a field that takes `mask`; of the shape of the state up to the axis that it masks. By default
            that which a layer such as `Masking` or `Embedding` gave to `inputs`. Masked steps are solved like others.
            The output carries the mask on, with `ts` as `(batch, T, ...)`: once for each of the times.
        inputs_mask: filled in by Keras with the mask of `inputs`; pass `mask` instead.

    Input shape:
        `(batch, ..., features)`, or a nest of such shapes.

    Output shape:
        The input's, its last axis longer by `augment_dims`; with `ts`, `(batch, T, ..., features)`.

    A solve that fails (too many steps, a NaN, a vanishing step size) raises `tf.errors.InvalidArgumentError`, except
    under XLA, where nothing can raise: its output is NaN there.

    Example:
    >>> field = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(8)])
    >>> layer = keras_node.ODELayer(field)
    >>> x = keras.random.normal((4, 8))
    >>> layer(x).shape
    TensorShape([4, 8])
    >>> layer(x, ts=[0.0, 0.5, 1.0]).shape
    TensorShape([4, 3, 8])

    Reference:

    - Chen et al. (2018), "Neural Ordinary Differential Equations".
    - Dupont, Doucet & Teh (2019), "Augmented Neural ODEs".
    """

    def __init__(
        self,
        vector_field,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        solver="tsit5",
        gradient="backsolve",
        augment_dims: int = 0,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs,
    ):
        # The state keeps its precision under a mixed policy; the field casts for itself.
        super().__init__(autocast=False, **kwargs)
        if not np.isfinite(t0) or not np.isfinite(t1):
            raise ValueError(f"`t0` and `t1` must be finite numbers. Received: t0={t0}, t1={t1}")
        call_arguments(vector_field)
        self.vector_field = vector_field
        self.t0 = float(t0)
        self.t1 = float(t1)
        self.augment_dims = non_negative_integer("augment_dims", augment_dims)
        self.set_options(solver, gradient, jit_compile, track_stats)
        self.supports_masking = True
        self.masked = _Masked(autocast=False, dtype=self.dtype_policy)

    def __call__(self, inputs, ts=None, args=None, **kwargs):
        # Keras would make float64 tensors of NumPy arrays, and refuse lists of numbers that are not keywords.
        args = tf.nest.map_structure(self._argument, args)
        if ts is not None:
            _check_times(_shape(ts))
        if isinstance(ts, np.ndarray):
            # Keras would make a tensor of it, and nothing would tell that no gradient is wanted for these times.
            ts = ts.tolist()
        return super().__call__(inputs, ts=ts, args=args, **kwargs)

    def build(self, inputs_shape, ts_shape=None):
        # Keras does not tell the shapes of an argument called `args`; with it, the first call builds the field.
        if isinstance(self.vector_field, keras.Layer) and call_arguments(self.vector_field)[0] < 3:
            self._build_field(inputs_shape, ts_shape is not None and len(ts_shape) == 2, None)

    def call(self, inputs, ts=None, args=None, training=None, mask=None, inputs_mask=None):
        mask = _known(inputs_mask if mask is None else mask)
        y0 = tf.nest.map_structure(self._initial_state, inputs)
        times = [self.t0, self.t1] if ts is None else self._times(ts)
        solution = self.options.solve(self.vector_field, y0, times, args=args, training=training, mask=mask)

        def output(y):
            y = y[-1] if ts is None else ops.moveaxis(y[1:], 0, 1)
            return ops.cast(y, self.compute_dtype)

        return self._with_mask(tf.nest.map_structure(output, solution.ys), mask, ts)

    def compute_output_spec(self, inputs, ts=None, args=None, training=None, mask=None, inputs_mask=None):
        del training
        ts_shape = None if ts is None else _shape(ts)
        if args is not None and isinstance(self.vector_field, keras.Layer):
            own_times = ts_shape is not None and len(ts_shape) == 2
            self._build_field(tf.nest.map_structure(lambda x: tuple(x.shape), inputs), own_times, args)

        def output(x):
            return keras.KerasTensor(self._output_shape(tuple(x.shape), ts_shape), dtype=self.compute_dtype)

        outputs = tf.nest.map_structure(output, inputs)
        return self._with_mask(outputs, _known(inputs_mask if mask is None else mask), ts)

    def compute_output_shape(self, inputs_shape, ts_shape=None):
        return _map_shapes(lambda shape: self._output_shape(shape, ts_shape), inputs_shape)

    def get_config(self):
        config = super().get_config()
        config.update(t0=self.t0, t1=self.t1, augment_dims=self.augment_dims)
        return config

    def _build_field(self, inputs_shape, own_times, args):
        def spec(shape):
            return keras.KerasTensor(shape, dtype=self.variable_dtype)

        y = _map_shapes(lambda shape: spec(self._augmented_shape(shape)), inputs_shape)
        rank = len(tf.nest.flatten(y)[0].shape)
        own_times = own_times or self.solver.per_sample
        build(self.vector_field, spec((None,) + (1,) * (rank - 1) if own_times else ()), y, args)

    def _initial_state(self, x):
        if not tf.as_dtype(x.dtype).is_floating:
            raise TypeError(
                f"Layer {self.name!r} integrates floating-point states; cast or embed its input first. "
                f"Received: inputs of dtype {tf.as_dtype(x.dtype).name} and shape {tuple(x.shape)}"
            )
        x = ops.cast(x, self.variable_dtype)
        if self.augment_dims:
            self._augmented_shape(x.shape)  # checks it
            x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, self.augment_dims)])
        return x

    def _times(self, ts):
        """The times of a solve, `t0` first: `(T + 1,)` or `(T + 1, batch)`."""
        known = as_numbers(ts)
        if known is not None and known.ndim in (1, 2):
            return np.concatenate([np.full_like(known.T[:1], self.t0), known.T], axis=0)
        ts = prepare_times(ts, self.variable_dtype)
        if len(ts.shape) not in (1, 2):
            raise ValueError(f"`ts` must be of shape (T,) or (batch, T). Received: ts.shape={tuple(ts.shape)}")
        ts = ops.transpose(ts)
        return ops.concatenate([ops.full_like(ts[:1], self.t0), ts], axis=0)

    def _argument(self, x):
        if not isinstance(x, np.ndarray | np.generic) or not np.issubdtype(x.dtype, np.floating):
            return x
        return ops.convert_to_tensor(x, self.variable_dtype)

    def _with_mask(self, outputs, mask, ts):
        """The outputs with the mask of the inputs, once for each of the asked times."""
        if mask is None:
            return outputs

        def leaf(y, mask):
            if mask is not None and ts is not None:
                mask = ops.repeat(ops.expand_dims(mask, 1), _shape(ts)[-1] or ops.shape(ts)[-1], axis=1)
            return y if mask is None else self.masked(y, mask=mask)

        return tf.nest.map_structure(leaf, outputs, mask)

    def _augmented_shape(self, shape):
        if len(shape) < 2 and self.augment_dims:
            raise ValueError(f"`augment_dims` needs an axis beside the batch. Received: inputs of shape {tuple(shape)}")
        return (*shape[:-1], None if shape[-1] is None else shape[-1] + self.augment_dims)

    def _output_shape(self, shape, ts_shape):
        shape = self._augmented_shape(shape)
        if ts_shape is None:
            return shape
        _check_times(ts_shape)
        return (shape[0], ts_shape[-1], *shape[1:])


class _Masked(keras.layers.Layer):
    """Gives its input the mask that it is called with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.built = True  # which `quantize` asks of every layer

    def call(self, x, mask=None):
        return x

    def compute_output_spec(self, x, mask=None):
        return x


def _shape(ts):
    return tuple(ts.shape) if hasattr(ts, "shape") else np.shape(ts)


def _check_times(shape):
    if len(shape) not in (1, 2) or shape[-1] == 0:
        raise ValueError(
            f"`ts` must be of shape (T,) or (batch, T), with one time or more. Received: ts.shape={tuple(shape)}"
        )


def _known(mask):
    """A nest of masks, or `None` if all of it is."""
    return None if all(m is None for m in tf.nest.flatten(mask)) else mask


def _map_shapes(function, shapes):
    """Applies a function to every shape of a nest, whose leaves are tuples or lists of dimensions."""
    if isinstance(shapes, dict):
        return {key: _map_shapes(function, shape) for key, shape in shapes.items()}
    if all(d is None or isinstance(d, int) for d in shapes):
        return function(tuple(shapes))
    return type(shapes)(_map_shapes(function, shape) for shape in shapes)
