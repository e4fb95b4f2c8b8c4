"""A variational autoencoder for irregular series, whose latent state follows an ODE."""

from typing import ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_node.arguments import non_negative_integer, positive_integer
from keras_node.control import last_valid
from keras_node.layers.irregular_times import check_order, elapsed_times, with_start
from keras_node.layers.ode_layer import ODELayer
from keras_node.models.likelihood_model import LikelihoodModel
from keras_node.nested_layers import NestedLayers
from keras_node.times import prepare_times

_SMALLEST_SCALE = 1e-5  # softplus underflows to zero, where the KL divergence is infinite


@keras.saving.register_keras_serializable(package="keras_node")
class LatentODE(NestedLayers, LikelihoodModel):
    """A generative model of series observed at irregular times: each is one path of an ODE in a latent space.

    `z(t0) ~ Normal(0, I)`

    `dz/dt = f(t, z)`

    `x[i] ~ Normal(decoder(z(t[i])), noise_scale)`

    An encoder reads the observations from the last to the first, and on to `t0`, and gives `q(z(t0))`, the approximate
    posterior. `fit` minimises the negative evidence lower bound (ELBO), in nats for a series,

    `nll + KL(q || Normal(0, I))`

    with `nll = -sum of log p(x[i] | z(t[i]))` over what was observed, for one `z(t0)` drawn from `q`.

    Args:
        latent_dim: number of latent dimensions.
        units: width of the layers that are not given. Defaults to `32`.
        encoder_cell: the Keras cell that takes in a step: the values, zero where none was observed, as many marks of
            what was, and in the last channel the time, zero or more, from this step to the one taken in before it.
            Defaults to `keras.layers.GRUCell(units)`; `keras_node.ODERNNCell(keras.layers.GRUCell(units), field)` makes
            the encoder an ODE-RNN.
        vector_field: what moves the latent state, a Keras layer or model or a registered callable, `(z)` or `(t, z)`.
            Defaults to a network with one hidden layer.
        decoder: the Keras layer or model from latent states `(batch, T, latent_dim)` to the means of observations.
            Defaults to a network with one hidden layer.
        noise_scale: standard deviation of the observations' noise, a number; or `None` (default) to learn one for every
            channel, from 1 on.
        kl_annealing_steps: number of steps of the optimizer over which the weight of the KL divergence in the training
            loss rises from 0 to 1, linearly. Defaults to `0`: it is 1 throughout, as it always is in `evaluate`.
        t0: time of the latent state's distribution, a number, at or before all observations. Defaults to `0.0`.
        solver: as in `keras_node.ODELayer`.
        gradient: as in `keras_node.ODELayer`.
        jit_compile: as in `keras_node.ODELayer`. Defaults to `"auto"`.
        track_stats: as in `keras_node.ODELayer`. Defaults to `False`.
        **kwargs: arguments of `keras.Model`, such as `name` and `dtype`.

    Call arguments:
        inputs: the observations, a tuple `(times, values, mask)`. What `values` hold where `mask` is false, and `times`
            at steps where it is false for all channels, has no effect on `q` and the loss. The times of the other steps
            must not decrease. `mask` is boolean or, as several devices need it (`tf.distribute`), 0 and 1.
        training: Python boolean, handed on to the layers.

    Input shape:
        `times`: `(batch, T)`, or `(T,)` where the batch shares them. `values` and `mask`: `(batch, T, features)`.

    Output shape:
        `(batch, T, features)`: the reconstruction, from the mean of `q`, at all of `times`. A step without observations
        whose time lies before the last one observed, such as padding by zeros, repeats that one.

    `fit(x)` with `x = (times, values, mask)` learns to reconstruct the observations. `fit(x, y)` with
    `y = (times, values, mask)` of its own length has the encoder read `x` and the loss compare with `y`: all
    observations, say, where `x` has a part of them. A `tf.data.Dataset` yields `(x,)`, `(x, y)` or
    `(x, y, sample_weight)`, where `y` may be `None`. With `sample_weight`, one number for a series, the loss is the sum
    of the weighted losses over the number of series, as Keras' losses do. `compile` takes no loss and no metrics; the
    logs have `loss`, `nll`, `kl` and the mean squared error `mse`, all for one draw from `q`.

    Times that decrease raise `ValueError`, in a graph `tf.errors.InvalidArgumentError`. Under XLA, where nothing can
    raise, all results are NaN for that sample.

    Example:
    >>> times = keras.ops.sort(keras.random.uniform((8, 5)), axis=1)
    >>> values = keras.ops.sin(6 * times)[..., None]
    >>> mask = keras.random.uniform((8, 5, 1)) < 0.8
    >>> model = keras_node.LatentODE(4, solver="bosh3", kl_annealing_steps=100)
    >>> model.compile("adam")
    >>> history = model.fit((times, values, mask), epochs=2, verbose=0)
    >>> sorted(history.history)
    ['kl', 'loss', 'mse', 'nll']
    >>> model.reconstruct((times, values, mask)).shape
    TensorShape([8, 5, 1])
    >>> model.extrapolate((times, values, mask), [1.0, 1.5, 2.0]).shape
    TensorShape([8, 3, 1])
    >>> model.sample(3, [0.0, 0.5, 1.0, 1.5]).shape
    TensorShape([3, 4, 1])

    Reference:

    - Chen et al. (2018), "Neural Ordinary Differential Equations", section 5.
    - Rubanova, Chen & Duvenaud (2019), "Latent ODEs for Irregularly-Sampled Time Series".
    """

    measures = ("nll", "kl", "mse")
    nested: ClassVar = {"encoder_cell": "encoder.cell", "vector_field": "dynamics.vector_field", "decoder": "decoder"}

    def __init__(
        self,
        latent_dim: int,
        *,
        units: int = 32,
        encoder_cell=None,
        vector_field=None,
        decoder=None,
        noise_scale: float | None = None,
        kl_annealing_steps: int = 0,
        t0: float = 0.0,
        solver="tsit5",
        gradient="backsolve",
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs,
    ):
        # The input is not cast: times must not lose their digits under a mixed policy.
        super().__init__(autocast=False, **kwargs)
        if noise_scale is not None and not noise_scale > 0:
            raise ValueError(f"`noise_scale` must be positive, or `None`. Received: noise_scale={noise_scale}")
        self.latent_dim = latent_dim = positive_integer("latent_dim", latent_dim)
        self.units = units = positive_integer("units", units)
        self.noise_scale = noise_scale
        self.kl_annealing_steps = non_negative_integer("kl_annealing_steps", kl_annealing_steps)

        dtype = self.dtype_policy
        cell = keras.layers.GRUCell(units, dtype=dtype) if encoder_cell is None else encoder_cell
        self.encoder = keras.layers.RNN(cell, go_backwards=True, autocast=False, dtype=dtype, name="encoder")
        self.posterior_parameters = keras.layers.Dense(2 * latent_dim, dtype=dtype, name="posterior_parameters")
        field = _network(units, latent_dim, dtype, "vector_field") if vector_field is None else vector_field
        self.dynamics = ODELayer(
            field,
            t0,
            solver=solver,
            gradient=gradient,
            jit_compile=jit_compile,
            track_stats=track_stats,
            dtype=dtype,
            name="dynamics",
        )
        self.decoder = decoder
        self.seed_generator = keras.random.SeedGenerator()

    def build(self, inputs_shape):
        _, values_shape, _ = inputs_shape
        features = values_shape[-1]
        self.encoder.build((None, None, 2 * features + 1))
        self.posterior_parameters.build(self.encoder.compute_output_shape((None, None, 2 * features + 1)))
        self.dynamics.build((None, self.latent_dim), (None, None))
        if self.decoder is None:
            self.decoder = _network(self.units, features, self.dtype_policy, "decoder")
        mean = self.decoder(keras.KerasTensor((None, None, self.latent_dim), dtype=self.compute_dtype))
        if mean.shape[-1] != features:
            raise ValueError(
                "`decoder` must return as many channels as `values` have. "
                f"Received: a decoder with output of shape {mean.shape} for values of shape {tuple(values_shape)}"
            )
        if self.noise_scale is None:
            self.log_noise_scale = self.add_weight(shape=(features,), initializer="zeros", name="log_noise_scale")

    def call(self, inputs, training=None):
        times, values, _ = self._series(inputs)
        # Also at times when nothing was observed, unless they go back, as in padding.
        given = prepare_times(inputs[0], values.dtype)
        times = ops.maximum(ops.where(ops.isfinite(given), given, times), times)
        return self.decode(self.posterior(inputs, training).mean(), times, training)

    @property
    def prior(self):
        """The distribution of the latent state at `t0`, a `tfd.MultivariateNormalDiag`."""
        from tensorflow_probability import distributions as tfd

        return tfd.MultivariateNormalDiag(ops.zeros(self.latent_dim, self.variable_dtype))

    @property
    def kl_weight(self):
        """The weight of the KL divergence in the training loss of the next step."""
        if not self.kl_annealing_steps or getattr(self, "optimizer", None) is None:
            return ops.ones((), self.variable_dtype)
        steps = ops.cast(self.optimizer.iterations, self.variable_dtype)
        return ops.minimum(steps / self.kl_annealing_steps, 1)

    def posterior(self, inputs, training=None):
        """The approximate posterior of the latent state at `t0`, a `tfd.MultivariateNormalDiag` of a batch.

        Args:
            inputs: the observations, `(times, values, mask)`.
            training: Python boolean, handed on to the encoder.
        """
        from tensorflow_probability import distributions as tfd

        times, values, observed = self._series(inputs)
        times = ops.broadcast_to(times, ops.shape(values)[:2])
        # A step at `t0` without observations lets the encoder know how long before them it is.
        front = [(0, 0), (1, 0)]
        times = ops.pad(times, front, constant_values=self.dynamics.t0)
        valid = with_start(ops.any(observed, axis=-1))
        elapsed, _ = elapsed_times(times, valid, None, backwards=True)
        ordered = ops.all(ops.isfinite(elapsed) & (elapsed <= 0), axis=1, keepdims=True)
        with tf.control_dependencies(check_order(ordered[:, 0], times, self)):
            elapsed = ops.cast(ops.where(ordered, -elapsed, 0), values.dtype)
        marks = ops.cast(observed, values.dtype)
        steps = ops.pad(ops.concatenate([values, marks], axis=-1), [*front, (0, 0)])
        steps = ops.concatenate([steps, elapsed[..., None]], axis=-1)
        parameters = self.posterior_parameters(self.encoder(steps, mask=valid, training=training))
        loc, scale = ops.split(ops.cast(parameters, self.variable_dtype), 2, axis=-1)
        loc = ops.where(ordered, loc, float("nan"))
        return tfd.MultivariateNormalDiag(loc, ops.softplus(scale) + _SMALLEST_SCALE)

    def decode(self, z0, times, training=None):
        """The means of observations `(batch, T, features)` on the paths that start in `z0`.

        Args:
            z0: latent states at `t0`, `(batch, latent_dim)`.
            times: `(T,)` or `(batch, T)`, monotonic, from `t0` on.
            training: Python boolean, handed on to the field and the decoder.
        """
        if self.decoder is None:
            raise ValueError(
                f"How many channels an observation of model {self.name!r} has is known once it has seen some: `fit` it "
                "or call it, or give it a `decoder`."
            )
        z = self.dynamics(z0, ts=times, training=training)
        return ops.cast(self.decoder(z, training=training), self.compute_dtype)

    def reconstruct(self, inputs):
        """The means of observations at the times of `inputs`, `(times, values, mask)`: what the model returns."""
        return self(inputs)

    def extrapolate(self, inputs, times):
        """The means of observations at other times, `(batch, T, features)`, from the mean of the posterior.

        Args:
            inputs: the observations, `(times, values, mask)`.
            times: `(T,)` or `(batch, T)`, among those of the observations or not; monotonic, from `t0` on.
        """
        return self.decode(self.posterior(inputs).mean(), times)

    def sample(self, n: int, times):
        """The means of observations on `n` paths that start from the prior, `(n, T, features)`.

        Args:
            n: number of paths.
            times: `(T,)` or `(n, T)`, monotonic, from `t0` on.
        """
        z0 = keras.random.normal((n, self.latent_dim), dtype=self.variable_dtype, seed=self.seed_generator)
        return self.decode(z0, times)

    def sample_losses(self, x, y, y_pred, training):
        """The negative ELBO of each series, for one draw from the posterior, and its parts.

        Args:
            x: the observations that the encoder reads, `(times, values, mask)`.
            y: those whose likelihood counts, `(times, values, mask)`. `None` stands for `x`.
            y_pred: not used; predictions depend on the draw.
            training: whether layers are in training mode, and the KL divergence has its weight `kl_weight`.
        """
        from tensorflow_probability import distributions as tfd

        posterior = self.posterior(x, training)
        loc = posterior.mean()
        noise = keras.random.normal(ops.shape(loc), dtype=loc.dtype, seed=self.seed_generator)
        z0 = loc + posterior.stddev() * noise

        times, values, observed = self._series(x if y is None else y)
        mean = ops.cast(self.decode(z0, times, training), values.dtype)
        scale = ops.exp(self.log_noise_scale) if self.noise_scale is None else self.noise_scale
        log_prob = tfd.Normal(mean, scale).log_prob(values)
        nll = -ops.sum(ops.where(observed, log_prob, 0), axis=(1, 2))
        kl = tfd.kl_divergence(posterior, self.prior)
        each = ops.ones_like(kl)
        measures = {"nll": (nll, each), "kl": (kl, each), "mse": (ops.square(mean - values), observed)}
        return nll + (self.kl_weight if training else 1) * kl, measures

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape[1])

    def get_config(self):
        config = super().get_config()
        config.update(
            latent_dim=self.latent_dim,
            units=self.units,
            noise_scale=self.noise_scale,
            kl_annealing_steps=self.kl_annealing_steps,
            t0=self.dynamics.t0,
        )
        return {**config, **self.dynamics.options.get_config()}

    def _series(self, series):
        """Times for a solve, values with zeros where none was observed, and where one was."""
        if not isinstance(series, list | tuple) or len(series) != 3:
            raise ValueError(f"A batch of series is a tuple `(times, values, mask)`. Received: {series!r}")
        times = prepare_times(series[0], self.variable_dtype)
        values, mask = (ops.convert_to_tensor(x) for x in series[1:])
        if len(values.shape) != 3 or len(mask.shape) != 3 or len(times.shape) not in (1, 2):
            raise ValueError(
                "`times` must be (batch, T) or (T,), and `values` and `mask` (batch, T, features). Received: shapes "
                f"{tuple(times.shape)}, {tuple(values.shape)} and {tuple(mask.shape)}"
            )
        if not self.built:
            self.build(tuple(tuple(x.shape) for x in (times, values, mask)))
        observed = ops.cast(mask, "bool")
        values = ops.where(observed, ops.cast(values, self.variable_dtype), 0)
        if len(times.shape) == 2:
            # A solve must not turn back for the time of a step without observations, which may be anything.
            front = [(0, 0), (1, 0)]
            valid = with_start(ops.any(observed, axis=-1))
            times = last_valid(ops.pad(times, front, constant_values=self.dynamics.t0), valid)[:, 1:]
        return times, values, observed


def _network(units, outputs, dtype, name):
    hidden = keras.layers.Dense(units, activation="tanh", dtype=dtype)
    return keras.Sequential([hidden, keras.layers.Dense(outputs, dtype=dtype)], name=name)
