"""A variational autoencoder for irregular series, whose latent state follows an ODE."""

from collections.abc import Callable
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.arguments import non_negative_integer, positive_integer, positive_number
from keras_node.autograph import without_autograph
from keras_node.control import running_maximum
from keras_node.layers.irregular_times import check_order, elapsed_times, with_start
from keras_node.layers.ode_layer import ODELayer
from keras_node.models.likelihood_model import LikelihoodModel
from keras_node.models.observed_series import check_shapes, prepare, with_own_times
from keras_node.nested_layers import NestedLayers, keep_frozen
from keras_node.solve_options import Gradient, Solver
from keras_node.times import prepare_times

_SMALLEST_SCALE = 1e-5  # softplus underflows to zero, where the KL divergence is infinite


@keras.saving.register_keras_serializable(package="keras_node")
class LatentODE(NestedLayers, LikelihoodModel):
    """A generative model of irregular series, in which each series is one path of an ODE in a latent space.

    `z(t0) ~ Normal(0, I)`

    `dz/dt = f(t, z)`

    `x[i] ~ Normal(decoder(z(t[i])), noise_scale)`

    An encoder reads the observations from the last to the first, and then on to `t0`. It returns the approximate
    posterior `q(z(t0))`. `fit` minimises the negative evidence lower bound (ELBO) of a series, in nats:

    `loss = nll + KL(q || Normal(0, I))`

    `nll = -sum of log p(x[i] | z(t[i]))`

    The sum is over all values that were observed, for one `z(t0)` drawn from `q`.

    `fit(x)` with `x = (times, values, mask)` learns to reconstruct the observations. In `fit(x, y)` the encoder reads
    `x`, and the loss compares with `y = (times, values, mask)`, which may have another length: for example, `x` holds a
    part of the observations and `y` all of them. A `tf.data.Dataset` yields `(x,)`, `(x, y)` or
    `(x, y, sample_weight)`, where `y` may be `None`. With `sample_weight`, one number for each series, the loss is the
    sum of the weighted losses, divided by the number of series, as for the losses of Keras. `compile` takes no loss and
    no metrics. The logs have `loss`, `nll`, `kl` and the mean squared error `mse`, all for one draw from `q`.

    Args:
        latent_dim: number of latent dimensions, a positive integer.
        units: width of the default cell and of the hidden layers of the default networks. Defaults to `32`.
        encoder_cell: the Keras cell of the encoder. Its input at a step consists of the values (zero if not observed),
            the marks of which values were observed (0 or 1), and one channel with the time between this step and the
            step that was read before it, which is zero or more. Defaults to `keras.layers.GRUCell(units)`. For an
            ODE-RNN as encoder, use `keras_node.ODERNNCell(keras.layers.GRUCell(units), field)`.
        vector_field: the field `f` of the latent state, a Keras layer or model, or a registered callable. It takes
            `(z)` or `(t, z)`. Defaults to a network with one hidden layer.
        decoder: the Keras layer or model that maps latent states `(batch, T, latent_dim)` to the means of observations
            `(batch, T, features)`. Defaults to a network with one hidden layer.
        noise_scale: standard deviation of the noise of observations, a positive number in the unit of the values; or
            `None` (default) to learn one for each channel, starting at 1.
        kl_annealing_steps: number of optimizer steps in which the weight of the KL divergence in the training loss
            rises linearly from 0 to 1. Defaults to `0`: the weight is always 1, as it is in `evaluate`.
        t0: time at which the latent state has its distribution, a number in the unit of `times`. No observation may be
            earlier. The field sees `t` as it runs from `t0` to the times of the observations. Defaults to `0.0`.
        solver: as in `keras_node.ODELayer`. Defaults to `"tsit5"`.
        gradient: as in `keras_node.ODELayer`. Defaults to `None`.
        jit_compile: as in `keras_node.ODELayer`. Defaults to `"auto"`.
        track_stats: as in `keras_node.ODELayer`. Defaults to `False`.
        **kwargs: arguments of `keras.Model`, such as `name` and `dtype`.

    Call arguments:
        inputs: the observations, a tuple `(times, values, mask)` or `(times, values)`. `times` are in any unit and must
            not decrease from one step with observations to the next. A value that was not observed is NaN, or `mask` is
            false there. The mask is boolean, or 0 and 1, which several devices (`tf.distribute`) need.
        training: Python boolean, passed to the layers.

    Input shape:
        `times`: `(batch, T)`, or `(T,)` if all samples share them. `values`: `(batch, T, features)`. `mask`:
        `(batch, T)` or `(batch, T, features)`.

    Output shape:
        `(batch, T, features)`: the reconstruction at all `times`, from the mean of `q`.

    Masking:
        The mask is an input. A value that is NaN or whose mask is false has no effect on `q` and the loss, and neither
        has the time of a step without any value. If the time of such a step is earlier than that of a step before it,
        as in padding with zeros, the output repeats the reconstruction of the latest step so far. The model neither
        reads nor returns a Keras mask.

    Raises:
        ValueError: for an option out of range, for inputs of another shape, and for times that decrease.
        tf.errors.InvalidArgumentError: in a graph, for times that decrease, and if a solve fails. In a model
            that is compiled with XLA nothing can raise; the results of that sample are NaN instead.

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

        - Chen, Rubanova, Bettencourt & Duvenaud (2018), "Neural Ordinary Differential Equations", arXiv:1806.07366,
          section 5.
        - Rubanova, Chen & Duvenaud (2019), "Latent ODEs for Irregularly-Sampled Time Series", arXiv:1907.03907.
    """

    measures = ("nll", "kl", "mse")
    nested: ClassVar = {"encoder_cell": "encoder.cell", "vector_field": "dynamics.vector_field", "decoder": "decoder"}

    def __init__(
        self,
        latent_dim: int,
        *,
        units: int = 32,
        encoder_cell: keras.Layer | None = None,
        vector_field: keras.Layer | Callable | None = None,
        decoder: keras.Layer | None = None,
        noise_scale: float | None = None,
        kl_annealing_steps: int = 0,
        t0: float = 0.0,
        solver: Solver = "tsit5",
        gradient: Gradient | None = None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        # Without autocast, times keep their digits under a mixed policy.
        super().__init__(autocast=False, **kwargs)
        self.latent_dim = latent_dim = positive_integer("latent_dim", latent_dim)
        self.units = units = positive_integer("units", units)
        self.noise_scale = None if noise_scale is None else positive_number("noise_scale", noise_scale)
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
        keep_frozen(self)

    def build(self, inputs_shape: Any) -> None:
        check_shapes(inputs_shape)
        self.inputs_shape = inputs_shape
        values_shape = inputs_shape[1]
        features = values_shape[-1]
        if features is None:
            raise ValueError(
                f"The number of channels of `values` must be known. Received: values of shape {tuple(values_shape)}"
            )
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
        keep_frozen(self)

    def prepare_data(self, arguments: dict[str, Any], trains: bool) -> dict[str, Any]:
        """Gives each series its times, and refuses times that Keras would round."""
        del trains
        prepared = {name: with_own_times(arguments.get(name)) for name in ("x", "y")}
        if isinstance(arguments.get("validation_data"), list | tuple):
            prepared["validation_data"] = tuple(with_own_times(part) for part in arguments["validation_data"])
        return {**arguments, **prepared}

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Returns the reconstructions at all times, like `keras.Model.predict`."""
        return super().predict(with_own_times(x), *args, **kwargs)

    def call(self, inputs: tuple, training: bool | None = None) -> tf.Tensor:
        times, values, _ = self._series(inputs)
        # Steps without observations keep their times too, unless these go back, as in padding.
        given = prepare_times(inputs[0], values.dtype)
        times = running_maximum(ops.maximum(ops.where(ops.isfinite(given), given, times), times))
        return self.decode(self.posterior(inputs, training).loc, times, training)

    @property
    def prior(self) -> Any:
        """The distribution of the latent state at `t0`, a `tfd.MultivariateNormalDiag`."""
        from tensorflow_probability import distributions as tfd

        return tfd.MultivariateNormalDiag(ops.zeros(self.latent_dim, self.variable_dtype))

    @property
    def kl_weight(self) -> tf.Tensor:
        """The weight of the KL divergence in the training loss of the next step."""
        if not self.kl_annealing_steps or getattr(self, "optimizer", None) is None:
            return ops.ones((), self.variable_dtype)
        steps = ops.cast(self.optimizer.iterations, self.variable_dtype)
        return ops.minimum(steps / self.kl_annealing_steps, 1)

    @without_autograph
    def posterior(self, inputs: tuple, training: bool | None = None) -> Any:
        """Returns the approximate posterior of the latent state at `t0`.

        Args:
            inputs: the observations, `(times, values, mask)`.
            training: Python boolean, passed to the encoder. Defaults to `None`.

        Returns:
            A `tfp.distributions.MultivariateNormalDiag` with the batch shape `(batch,)`.
        """
        from tensorflow_probability import distributions as tfd

        times, values, observed = self._series(inputs)
        times = ops.broadcast_to(times, ops.shape(values)[:2])
        # An extra step at `t0` without observations tells the encoder how long before the observations `t0` is.
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

    @without_autograph
    def decode(self, z0: Any, times: Any, training: bool | None = None) -> tf.Tensor:
        """Returns the means of observations on paths that start at given latent states.

        Args:
            z0: latent states at `t0`, `(batch, latent_dim)`.
            times: times of the observations, `(T,)` or `(batch, T)`; monotonic, beginning at `t0`.
            training: Python boolean, passed to the field and the decoder. Defaults to `None`.

        Returns:
            The means, `(batch, T, features)`.

        Raises:
            ValueError: if the number of channels is not known yet.
        """
        if self.decoder is None:
            raise ValueError(
                f"Model {self.name!r} does not know yet how many channels an observation has: call it on observations "
                "or `fit` it first, or give it a `decoder`. Received: decoder=None"
            )
        z = self.dynamics(z0, ts=times, training=training)
        return ops.cast(self.decoder(z, training=training), self.compute_dtype)

    @without_autograph
    def reconstruct(self, inputs: tuple) -> tf.Tensor:
        """Returns the means of observations at the times of the inputs, as calling the model does.

        Args:
            inputs: the observations, `(times, values, mask)`.

        Returns:
            The means, `(batch, T, features)`.
        """
        return self(inputs)

    def extrapolate(self, inputs: tuple, times: Any) -> tf.Tensor:
        """Returns the means of observations at other times, from the mean of the posterior.

        Args:
            inputs: the observations, `(times, values, mask)`.
            times: any times, `(T,)` or `(batch, T)`; monotonic, beginning at `t0`.

        Returns:
            The means, `(batch, T, features)`.
        """
        return self.decode(self.posterior(inputs).loc, times)

    def sample(self, n: int, times: Any) -> tf.Tensor:
        """Returns the means of observations on paths that start at draws from the prior.

        Args:
            n: number of paths.
            times: times of the observations, `(T,)` or `(n, T)`; monotonic, beginning at `t0`.

        Returns:
            The means, `(n, T, features)`.
        """
        z0 = keras.random.normal((n, self.latent_dim), dtype=self.variable_dtype, seed=self.seed_generator)
        return self.decode(z0, times)

    def sample_losses(self, x: Any, y: Any, y_pred: Any, training: bool) -> tuple[tf.Tensor, dict[str, tuple]]:
        """Returns the negative ELBO of each series for one draw from the posterior, and its parts.

        Args:
            x: the observations that the encoder reads, `(times, values, mask)`.
            y: the observations whose likelihood counts, `(times, values, mask)`, or `None` for those of `x`.
            y_pred: not used, because predictions depend on the draw.
            training: whether layers are in training mode, and the KL divergence has the weight `kl_weight`.
        """
        from tensorflow_probability import distributions as tfd

        posterior = self.posterior(x, training)
        loc = posterior.mean()
        noise = keras.random.normal(ops.shape(loc), dtype=loc.dtype, seed=self.seed_generator)
        z0 = loc + posterior.stddev() * noise

        times, values, observed = self._series(x if y is None else y)
        mean = ops.cast(self.decode(z0, times, training), values.dtype)
        if values.shape[-1] not in (None, mean.shape[-1]):
            raise ValueError(
                "`y` must have the channels that the decoder returns. "
                f"Received: values of shape {tuple(values.shape)} for {mean.shape[-1]} channels"
            )
        values = tf.ensure_shape(values, mean.shape)
        scale = ops.exp(self.log_noise_scale) if self.noise_scale is None else self.noise_scale
        log_prob = tfd.Normal(mean, scale).log_prob(values)
        nll = -ops.sum(ops.where(observed, log_prob, 0), axis=(1, 2))
        kl = tfd.kl_divergence(posterior, self.prior)
        each = ops.ones_like(kl)
        measures = {"nll": (nll, each), "kl": (kl, each), "mse": (ops.square(mean - values), observed)}
        return nll + (self.kl_weight if training else 1) * kl, measures

    def compute_output_shape(self, inputs_shape: Any) -> tuple:
        return tuple(inputs_shape[1])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            latent_dim=self.latent_dim,
            units=self.units,
            noise_scale=self.noise_scale,
            kl_annealing_steps=self.kl_annealing_steps,
            t0=self.dynamics.t0,
        )
        return {**config, **self.dynamics.options.get_config()}

    @without_autograph
    def _series(self, series: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the times, values and mask of a batch, and makes the weights of the model for them."""
        times, values, observed = prepare(series, self.variable_dtype, self.dynamics.t0)
        if not self.built:
            self.build([tuple(x.shape) for x in (times, values, observed)])
        return times, values, observed


def _network(units: int, outputs: int, dtype: Any, name: str) -> keras.Sequential:
    hidden = keras.layers.Dense(units, activation="tanh", dtype=dtype)
    return keras.Sequential([hidden, keras.layers.Dense(outputs, dtype=dtype)], name=name)
