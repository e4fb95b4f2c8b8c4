"""A continuous normalizing flow."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.arguments import positive_integer
from keras_node.layers.concat_squash import ConcatSquashField
from keras_node.models.density_field import DensityField
from keras_node.models.likelihood_model import LikelihoodModel
from keras_node.models.probability import make_bijector, make_distribution
from keras_node.pure_function import is_seed
from keras_node.signatures import build, call_arguments
from keras_node.solve_options import SolvingLayer
from keras_node.solvers.runge_kutta import RungeKutta

_TRACES = ("exact", "hutchinson")
_NOISES = ("rademacher", "gaussian")


@keras.saving.register_keras_serializable(package="keras_node")
class ContinuousFlow(SolvingLayer, LikelihoodModel):
    """A probability density of vectors (FFJORD): an ODE moves normally distributed noise to where the data are.

    A sample starts as `z`, drawn from the standard normal distribution, at time 0 and follows `dx/dt = f(t, x)` until
    `t1`. Its log-density is

    `log p(x(t1)) = log N(z) - integral of tr(df/dx) dt from 0 to t1`.

    The integral is solved together with the path, backward in time from `x(t1)`. `fit` minimises the mean of
    `-log p(x)`, in nats. In training it adds the means of the integrals of `||f||^2` and `||df/dx||_F^2` along the
    paths, times `kinetic_energy` and `jacobian_norm` (RNODE). Both make paths straight, so that the solver can take
    long steps. `evaluate` gives the negative log-likelihood alone, and regularizers of weights.

    `fit` and `evaluate` take no targets. With `sample_weight` they give the sum of the weighted losses over the number
    of samples, as Keras' losses do; the two energies are not weighted. A `tf.data.Dataset` or generator yields
    `(x, None, sample_weight)`, a `keras.utils.PyDataset` `(x, {"sample_weight": sample_weight})`.

    Args:
        event_dim: length of the vectors.
        vector_field: a Keras layer or model, or a callable registered with
            `keras.saving.register_keras_serializable`: `f(x)`, `f(t, x)` or `f(t, x, condition)`, of each sample by
            itself. Defaults to `keras_node.ConcatSquashField()`.
        t1: time of the data, positive. Defaults to `1.0`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"` with `rtol=atol=1e-5`.
        gradient: `"backsolve"` (default), `"checkpointed"`, `"direct"`, or an object.
        trace: `"exact"` (default) costs `event_dim` vector-Jacobian products for an evaluation of the field.
            `"hutchinson"` costs one product and gives an unbiased estimate, in training and elsewhere. A flow with
            the one may share its field with a flow with the other, to train fast and evaluate exactly. A field with
            noise of its own, such as dropout, needs `"hutchinson"` in training.
        noise: the distribution of the noise in Hutchinson's estimate, `"rademacher"` (default) or `"gaussian"`. It is
            drawn once for a solve.
        kinetic_energy: weight of the kinetic energy of the paths in training. Defaults to `0.0`.
        jacobian_norm: weight of the Frobenius norm of the Jacobian in training, estimated where the trace is.
            Defaults to `0.0`.
        steer: where training solves end: at a time drawn uniformly from `(-steer, steer)` for every batch, and not
            at 0 (STEER). Less than `t1`. Defaults to `0.0`.
        jit_compile: as in `keras_node.ODELayer`. Defaults to `"auto"`.
        track_stats: as in `keras_node.ODELayer`. Defaults to `False`.
        seed: of the noise, the end times and the samples; an integer or a `keras.random.SeedGenerator`.
        **kwargs: arguments of `keras.Model`, such as `name` and `dtype`.

    Call arguments:
        inputs: `x`, or `(x, condition)`, or `{"x": x, "condition": condition}`; `fit` and `evaluate` take the same.
        training: Python boolean, handed on to the field.

    Input shape:
        `(..., event_dim)`, the condition `(..., features)`.

    Output shape:
        `(...)`, the log-densities.

    A solve that fails raises `tf.errors.InvalidArgumentError`, except under XLA, where it gives NaN. Where the solver
    chooses its steps for a batch as a whole (`per_sample=False`), a density changes a little with the batch it is in,
    by about the tolerances.

    Example:
    >>> flow = keras_node.ContinuousFlow(2, solver="bosh3", seed=0)
    >>> flow.compile("adam")
    >>> history = flow.fit(keras.random.normal((64, 2)), verbose=0)
    >>> flow.sample(5).shape
    TensorShape([5, 2])
    >>> flow.as_distribution().log_prob(tf.zeros((3, 2))).shape
    TensorShape([3])

    Reference:

    - Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models".
    - Finlay et al. (2020), "How to Train Your Neural ODE: the World of Jacobian and Kinetic Regularization".
    - Ghosh et al. (2020), "STEER: Simple Temporal Regularization For Neural ODEs".
    """

    def __init__(
        self,
        event_dim: int,
        vector_field=None,
        *,
        t1: float = 1.0,
        solver=None,
        gradient="backsolve",
        trace: str = "exact",
        noise: str = "rademacher",
        kinetic_energy: float = 0.0,
        jacobian_norm: float = 0.0,
        steer: float = 0.0,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        seed=None,
        **kwargs,
    ):
        # The state keeps its precision under a mixed policy; the field casts for itself.
        super().__init__(autocast=False, **kwargs)
        if not 0 <= steer < t1 < math.inf:
            raise ValueError(f"A flow needs `0 <= steer < t1`, both finite. Received: steer={steer}, t1={t1}")
        if trace not in _TRACES:
            raise ValueError(f"`trace` must be one of {', '.join(_TRACES)}. Received: trace={trace!r}")
        if noise not in _NOISES:
            raise ValueError(f"`noise` must be one of {', '.join(_NOISES)}. Received: noise={noise!r}")
        if kinetic_energy < 0 or jacobian_norm < 0:
            raise ValueError(
                "`kinetic_energy` and `jacobian_norm` must be 0 or more. "
                f"Received: kinetic_energy={kinetic_energy}, jacobian_norm={jacobian_norm}"
            )
        self.event_dim = positive_integer("event_dim", event_dim)
        self.vector_field = ConcatSquashField(dtype=self.dtype_policy) if vector_field is None else vector_field
        self.num_arguments, _ = call_arguments(self.vector_field)
        self.t1 = float(t1)
        solver = RungeKutta("tsit5", rtol=1e-5, atol=1e-5) if solver is None else solver
        self.set_options(solver, gradient, jit_compile, track_stats)
        self.trace = trace
        self.noise = noise
        self.kinetic_energy = kinetic_energy
        self.jacobian_norm = jacobian_norm
        self.steer = steer
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    jit_compile = keras.Model.jit_compile  # what `compile` was told of the model as a whole

    @property
    def jit_compile_solves(self):
        return self.options.jit_compile

    def build(self, input_shape):
        x, condition = _parts(input_shape) if _is_nest_of_shapes(input_shape) else (input_shape, None)
        if x[-1] != self.event_dim:
            raise ValueError(f"`x` must be of shape (..., {self.event_dim}). Received: x.shape={tuple(x)}")
        if condition is not None and self.num_arguments < 3:
            raise ValueError(
                "A condition needs a vector field `f(t, x, condition)`. "
                f"Received: {self.vector_field!r}, which takes {self.num_arguments} argument(s)"
            )
        if isinstance(self.vector_field, keras.Layer):
            t = keras.KerasTensor((None, 1) if self.solver.per_sample else (), dtype=self.variable_dtype)
            x = keras.KerasTensor((None, self.event_dim), dtype=self.variable_dtype)
            if condition is not None:
                condition = keras.KerasTensor((None, condition[-1]), dtype=self.variable_dtype)
            build(self.vector_field, t, x, condition)

    def call(self, inputs, training=None):
        x, condition = _parts(inputs)
        if training and self.trace == "exact" and _draws(self.vector_field):
            raise ValueError(
                'With `trace="exact"` a field may be evaluated on several copies of its batch, which noise such as '
                f'dropout would make different: use `trace="hutchinson"`. Received: {self.vector_field!r}'
            )
        end = 0.0
        if training and self.steer:
            end = keras.random.uniform((), -self.steer, self.steer, self.variable_dtype, self.seed_generator)
        energies = bool(training and (self.kinetic_energy or self.jacobian_norm))
        z, integrals = self._solve(x, condition, [self.t1, end], energies, training)
        if energies:
            # Integrals that run back in time.
            kinetic_energy, jacobian_norm = -integrals[1], -integrals[2]
            energy = self.kinetic_energy * kinetic_energy + self.jacobian_norm * jacobian_norm
            # A device may be left without samples.
            self.add_loss(tf.math.divide_no_nan(ops.sum(energy), ops.cast(tf.size(energy), energy.dtype)))
        log_base = -0.5 * (ops.sum(z**2, axis=-1) + self.event_dim * math.log(2 * math.pi))
        return log_base + integrals[0]

    def sample_losses(self, x, y, y_pred, training):
        """The negative log-likelihood of each sample, `(...)`."""
        if y is not None:
            raise ValueError(
                "A flow is trained by maximum likelihood, without targets: `fit(x)`, `fit((x, condition))`, "
                f"`validation_data=x` or `((x, condition),)`. Received: y={y!r}"
            )
        return -(self(x, training=training) if y_pred is None else y_pred), {}

    def log_prob(self, x: Any, condition: Any = None) -> tf.Tensor:
        """The log-density of `x`, `(..., event_dim)`, in nats; `condition` broadcasts against it."""
        return self(x if condition is None else (x, condition))

    def sample(self, n: int, condition: Any = None, seed: Any = None) -> tf.Tensor:
        """Draws `n` samples, `(n, event_dim)`, or `(n, ..., event_dim)` for a condition `(..., features)`."""
        batch = () if condition is None else tuple(np.shape(condition)[:-1])
        seed = self.seed_generator if seed is None else seed
        z = keras.random.normal((n, *batch, self.event_dim), dtype=self.variable_dtype, seed=seed)
        rows, condition = self._rows(z, condition)
        solution = self.options.solve(self.vector_field, rows, [0.0, self.t1], args=condition)
        return tf.reshape(solution.ys[-1], tf.shape(z))

    def forward(self, z: Any, condition: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """From the base to the data: `x`, and `log |det dx/dz|`."""
        x, integrals = self._solve(z, condition, [0.0, self.t1])
        return x, integrals[0]

    def inverse(self, x: Any, condition: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """From the data to the base: `z`, and `log |det dz/dx|`."""
        z, integrals = self._solve(x, condition, [self.t1, 0.0])
        return z, integrals[0]

    def as_bijector(self, condition: Any = None):
        """The flow as a `tfp.bijectors.Bijector` from the base to the data, at one condition, which broadcasts.

        Each method solves anew, so its results follow the weights and have gradients. A density by way of a bijector
        therefore takes two solves. One is enough if other bijectors are applied to `as_distribution()` instead.
        """
        return make_bijector(self, condition)

    def as_distribution(self, condition: Any = None):
        """The flow as a `tfp.distributions.Distribution`; a condition `(..., features)` makes a batch.

        `log_prob` and `experimental_sample_and_log_prob` take one solve each, and follow the weights.
        """
        return make_distribution(self, condition)

    def compute_output_spec(self, inputs, training=None):
        x, _ = _parts(inputs)
        return keras.KerasTensor(tuple(x.shape[:-1]), dtype=self.variable_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            event_dim=self.event_dim,
            t1=self.t1,
            trace=self.trace,
            noise=self.noise,
            kinetic_energy=self.kinetic_energy,
            jacobian_norm=self.jacobian_norm,
            steer=self.steer,
            seed=self.seed,
        )
        return config

    def _solve(self, x, condition, ts, energies=False, training=None):
        """The states at the end, and the integrals of `DensityField` over time, one tensor each."""
        rows, condition = self._rows(x, condition)
        field = DensityField(self.vector_field, energies)
        solution = self.options.solve(
            field,
            (rows, tf.zeros((tf.shape(rows)[0], 3 if energies else 1), rows.dtype)),
            ts,
            args=(condition, self._noise(rows)),
            training=training,
        )
        rows, integrals = (y[-1] for y in solution.ys)
        shape = tf.shape(x)
        return tf.reshape(rows, shape), [tf.reshape(i, shape[:-1]) for i in tf.unstack(integrals, axis=-1)]

    def _rows(self, x, condition):
        """The vectors and their conditions as batches with one axis."""
        x = ops.convert_to_tensor(x, self.variable_dtype)
        if condition is not None:
            condition = ops.convert_to_tensor(condition, self.variable_dtype)
            features = condition.shape[-1]
            shape = tf.concat([tf.shape(x)[:-1], [features]], axis=0)
            condition = tf.reshape(tf.broadcast_to(condition, shape), (-1, features))
        if not self.built:
            shape = (None, self.event_dim)
            self.build(shape if condition is None else (shape, (None, features)))
        return tf.reshape(x, (-1, self.event_dim)), condition

    def _noise(self, like):
        if self.trace == "exact":
            return None
        if self.noise == "gaussian":
            return keras.random.normal(ops.shape(like), dtype=like.dtype, seed=self.seed_generator)
        uniform = keras.random.uniform(ops.shape(like), -1, 1, like.dtype, self.seed_generator)
        return tf.where(uniform < 0, -tf.ones_like(like), tf.ones_like(like))


def _parts(inputs):
    """`x` and the condition, or `None`."""
    if isinstance(inputs, dict):
        return inputs["x"], inputs.get("condition")
    return tuple(inputs) if isinstance(inputs, list | tuple) else (inputs, None)


def _draws(function):
    """Whether a field has a seed, and so may be noisy in training."""
    variables = function.non_trainable_variables if isinstance(function, keras.Layer) else []
    return any(is_seed(v) for v in variables)


def _is_nest_of_shapes(shape):
    return isinstance(shape, dict) or not all(d is None or isinstance(d, int) for d in shape)
