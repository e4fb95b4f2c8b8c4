"""A continuous normalizing flow."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_node.arguments import non_negative_integer, positive_integer
from keras_node.autograph import without_autograph
from keras_node.layers.concat_squash import ConcatSquashField
from keras_node.models.density_field import DensityField, draw_noise
from keras_node.models.flow_inputs import as_rows, check_features, check_length, leading_axes, split
from keras_node.models.flow_matching import FlowMatching, checked_coupling, refuse_weights
from keras_node.models.likelihood_model import LikelihoodModel
from keras_node.models.probability import make_bijector, make_distribution
from keras_node.pure_function import has_seed
from keras_node.signatures import build, call_arguments
from keras_node.solve_options import Gradient, Solver, SolvingLayer
from keras_node.solvers.runge_kutta import RungeKutta

_TRACES = ("exact", "hutchinson")
_NOISES = ("rademacher", "gaussian")


@keras.saving.register_keras_serializable(package="keras_node")
class ContinuousFlow(SolvingLayer, LikelihoodModel):
    """A probability density of vectors: an ODE moves normally distributed noise to the data (FFJORD).

    `z ~ Normal(0, I)` at time 0

    `dx/dt = f(t, x)` from `x(0) = z` until `t1`

    `log p(x(t1)) = log Normal(z) - integral of tr(df/dx) dt from 0 to t1`

    The model solves for the integral together with the path, backward in time from `x(t1)`. `fit` minimises the mean
    of `-log p(x)`, in nats. In training it adds the means of the integrals of `||f||^2` and `||df/dx||_F^2` along the
    paths, multiplied by `kinetic_energy` and `jacobian_norm` (RNODE). Both make the paths straighter, so the solver can
    take longer steps. `evaluate` returns the mean negative log-likelihood, plus any regularizers of weights.

    With `objective="flow_matching"`, `fit` needs no solve. For each `x` it draws noise `z ~ Normal(0, I)` and a time
    `t`, and minimises the mean of

    `||f(t, x_t) - (x - z) / t1||^2` with `x_t = (1 - t / t1) z + (t / t1) x`

    Everything else stays as it is. In the logs `loss` is then this one, and `val_loss` the negative log-likelihood. To
    go on by likelihood, set `flow.objective = "likelihood"`; compile again for another learning rate.

    `fit` and `evaluate` take no targets. With `sample_weight` the loss is the sum of the weighted losses, divided by
    the number of samples, as for the losses of Keras. The two energies are not weighted. A `tf.data.Dataset` or a
    generator yields `(x, None, sample_weight)`, and a `keras.utils.PyDataset` yields
    `(x, {"sample_weight": sample_weight})`.

    If the solver chooses its steps for the whole batch (`per_sample=False`), a density changes slightly with the other
    samples of its batch, by about the tolerances.

    Args:
        event_dim: length of the vectors, a positive integer.
        vector_field: the field `f`, a Keras layer or model, or a callable registered with
            `keras.saving.register_keras_serializable`. It takes `(x)`, `(t, x)` or `(t, x, condition)` and must treat
            each sample independently of the others. Defaults to `keras_node.ConcatSquashField()`.
        t1: time of the data, a positive number; the noise is at time 0. The field sees `t` between 0 and `t1`. Defaults
            to `1.0`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"` with `rtol=atol=1e-5`.
        gradient: as in `keras_node.ODELayer`. Defaults to `None`.
        trace: how to compute `tr(df/dx)`. `"exact"` (default) needs `event_dim` vector-Jacobian products at each
            evaluation of the field. `"hutchinson"` needs one product and gives an unbiased estimate, in training and in
            inference. Two flows may share a field, so you can train fast with `"hutchinson"` and evaluate with
            `"exact"`. A field that draws noise, such as dropout, needs `"hutchinson"` in training by likelihood.
        noise: the distribution of the noise in Hutchinson's estimate, `"rademacher"` (default) or `"gaussian"`. The
            noise is drawn once for each solve.
        kinetic_energy: weight of the integral of `||f||^2` in training, 0 or more. Defaults to `0.0`.
        jacobian_norm: weight of the integral of `||df/dx||_F^2` in training, 0 or more. It is estimated if the trace is
            estimated. Defaults to `0.0`.
        steer: in training, solves end at a random time instead of at 0, which is drawn for each batch from the uniform
            distribution on `(-steer, steer)` (STEER). Must be less than `t1`. Defaults to `0.0`.
        objective: what `fit` minimises, `"likelihood"` (default) or `"flow_matching"`. Flow matching calls the field as
            an ordinary layer, with `t` of shape `(batch, 1)`, so a field may have dropout with any `trace`, and a
            `BatchNormalization` updates its averages. It has no paths, so it refuses `kinetic_energy`,
            `jacobian_norm` and `steer`.
        coupling: how flow matching pairs noise and data, `"independent"` or `"optimal_transport"`. The latter permutes
            the noise of each batch so that the squared distances are nearly least. The paths become straighter and
            the gradient less noisy. The time for this grows with the square of the batch size. It takes no condition
            and no `sample_weight`, for which the noise would not be normal any more. Defaults to `None`, which is
            `"independent"` for flow matching.
        jit_compile: as in `keras_node.ODELayer`. Defaults to `"auto"`.
        track_stats: as in `keras_node.ODELayer`. Defaults to `False`.
        seed: the seed of the noise, the random times and the samples, an integer. Defaults to `None`, for a random
            seed.
        **kwargs: arguments of `keras.Model`, such as `name` and `dtype`.

    Call arguments:
        inputs: `x`, or `(x, condition)`, or `{"x": x, "condition": condition}`. `fit` and `evaluate` take the same.
        training: Python boolean, passed to the field.

    Input shape:
        `x`: `(..., event_dim)`. `condition`: `(..., features)`.

    Output shape:
        `(...)`, the log-densities.

    Masking:
        A mask has no effect, and the model does not pass it on.

    Raises:
        ValueError: for an option out of range, for options that do not go together, for inputs of another shape, for
            targets, for a condition that the field does not take, for a condition or weights with optimal transport,
            and for a field with dropout that is trained by likelihood with `trace="exact"`.
        tf.errors.InvalidArgumentError: if a solve fails. In a model that is compiled with XLA nothing can raise;
            the densities are NaN instead.

    Example:
        >>> flow = keras_node.ContinuousFlow(2, solver="bosh3", seed=0)
        >>> flow.compile("adam")
        >>> history = flow.fit(keras.random.normal((64, 2)), verbose=0)
        >>> flow.sample(5).shape
        TensorShape([5, 2])
        >>> flow.as_distribution().log_prob(tf.zeros((3, 2))).shape
        TensorShape([3])

    Reference:

        - Grathwohl et al. (2019), "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models",
          arXiv:1810.01367.
        - Finlay et al. (2020), "How to Train Your Neural ODE: the World of Jacobian and Kinetic Regularization",
          arXiv:2002.02798: `kinetic_energy` and `jacobian_norm`.
        - Ghosh et al. (2020), "STEER: Simple Temporal Regularization For Neural ODEs", arXiv:2006.10711: `steer`.
        - Lipman et al. (2023), "Flow Matching for Generative Modeling", arXiv:2210.02747, and Liu et al. (2023), "Flow
          Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", arXiv:2209.03003:
          `objective="flow_matching"`.
        - Tong et al. (2024), "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
          Transport", arXiv:2302.00482, and Pooladian et al. (2023), "Multisample Flow Matching: Straightening Flows
          with Minibatch Couplings", arXiv:2304.14772: `coupling="optimal_transport"`.
    """

    def __init__(
        self,
        event_dim: int,
        vector_field: keras.Layer | Callable | None = None,
        *,
        t1: float = 1.0,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        trace: str = "exact",
        noise: str = "rademacher",
        kinetic_energy: float = 0.0,
        jacobian_norm: float = 0.0,
        steer: float = 0.0,
        objective: str = "likelihood",
        coupling: str | None = None,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Without autocast, the state keeps its precision under a mixed policy. The field casts its own input.
        super().__init__(autocast=False, **kwargs)
        if not 0 <= steer < t1 < math.inf:
            raise ValueError(
                f"`steer` and `t1` must be finite, with `0 <= steer < t1`. Received: steer={steer}, t1={t1}"
            )
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
        self._choose(objective, coupling)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    # For a model, `jit_compile` is the option of `compile`, for the whole model.
    jit_compile = keras.Model.jit_compile

    @property
    def jit_compile_solves(self) -> bool | str:
        return self.options.jit_compile

    @property
    def objective(self) -> str:
        return self._objective

    @objective.setter
    def objective(self, value: str) -> None:
        self._choose(value, self.coupling if value == self.objective else None)
        self.train_function = None  # Keras keeps the compiled step of training, which has the former objective in it.

    def _choose(self, objective: str, coupling: str | None) -> None:
        self.coupling = checked_coupling(objective, coupling, self.kinetic_energy, self.jacobian_norm, self.steer)
        self._objective = objective

    def build(self, input_shape: Any) -> None:
        x, condition = split(input_shape)
        check_length(x, self.event_dim)
        self.inputs_shape = input_shape
        if condition is not None and self.num_arguments < 3:
            raise ValueError(
                "A condition needs a vector field `f(t, x, condition)`. Leave the condition out, or change the field. "
                f"Received: {self.vector_field!r}, which takes {self.num_arguments} argument(s)"
            )
        if condition is not None:
            check_features(tuple(condition))
        if isinstance(self.vector_field, keras.Layer):
            t = keras.KerasTensor((None, 1) if self.solver.per_sample else (), dtype=self.variable_dtype)
            x = keras.KerasTensor((None, self.event_dim), dtype=self.variable_dtype)
            if condition is not None:
                condition = keras.KerasTensor((None, condition[-1]), dtype=self.variable_dtype)
            build(self.vector_field, t, x, condition)

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        x, condition = split(inputs)
        if training and self.trace == "exact" and has_seed(self.vector_field):
            raise ValueError(
                'With `trace="exact"` a field may be evaluated on several copies of its batch, which must not differ, '
                'but noise such as dropout makes them differ: use `trace="hutchinson"`, or remove the noise. '
                f"Received: vector_field={self.vector_field!r}"
            )
        end = 0.0
        if training and self.steer:
            end = keras.random.uniform((), -self.steer, self.steer, self.variable_dtype, self.seed_generator)
        energies = bool(training and (self.kinetic_energy or self.jacobian_norm))
        z, integrals = self._solve(x, condition, [self.t1, end], energies, training)
        if energies:
            # The solve runs backward in time, so its integrals have the opposite sign.
            kinetic_energy, jacobian_norm = -integrals[1], -integrals[2]
            energy = self.kinetic_energy * kinetic_energy + self.jacobian_norm * jacobian_norm
            # With several devices, one of them may get no samples.
            self.add_loss(tf.math.divide_no_nan(ops.sum(energy), ops.cast(tf.size(energy), energy.dtype)))
        log_base = -0.5 * (tf.reduce_sum(z**2, axis=-1) + self.event_dim * math.log(2 * math.pi))
        return log_base + integrals[0]

    def prepare_data(self, arguments: dict[str, Any], trains: bool) -> dict[str, Any]:
        """Refuses labels `(N,)`, of which a batch would look like one condition with many features."""
        x = arguments.get("x")
        condition = split(x)[1] if isinstance(x, dict | list | tuple) else None
        if condition is not None and np.ndim(condition) == 1:
            check_features((None,))
        return arguments

    def sample_losses(self, x: Any, y: Any, y_pred: Any, training: bool) -> tuple[tf.Tensor, dict[str, tuple]]:
        """Returns the loss of each sample, `(...)`: in training that of the objective, else `-log p`."""
        if y is not None:
            raise ValueError(
                "A flow learns the density of its inputs, without targets. Call `fit(x)` or `fit((x, condition))`, and "
                f"pass `validation_data=x` or `validation_data=((x, condition),)`. Received: y={y!r}"
            )
        if training and self.objective == "flow_matching":
            x, condition = split(x)
            rows, condition, shape = self._rows(x, condition)
            matching = FlowMatching(self.vector_field, self.t1, self.coupling, self.seed_generator)
            return tf.reshape(matching(rows, condition, training=True), shape[:-1]), {}
        return -(self(x, training=training) if y_pred is None else y_pred), {}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        refuse_weights(self.coupling if training else None, sample_weight)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    @without_autograph
    def log_prob(self, x: Any, condition: Any = None) -> tf.Tensor:
        """Returns the log-density of vectors, in nats.

        Args:
            x: the vectors, `(..., event_dim)`.
            condition: the condition, `(..., features)`, which broadcasts against `x`. Defaults to `None`.

        Returns:
            The log-densities, `(...)`.
        """
        x, condition = (None if a is None else ops.convert_to_tensor(a, self.variable_dtype) for a in (x, condition))
        return self(x if condition is None else (x, condition))

    @without_autograph
    def sample(self, n: int, condition: Any = None, seed: Any = None) -> tf.Tensor:
        """Draws samples from the flow.

        Args:
            n: number of samples, for each condition if there are conditions.
            condition: the conditions, `(..., features)`. Defaults to `None`.
            seed: an integer or a `keras.random.SeedGenerator`. Defaults to that of the model.

        Returns:
            The samples, `(n, event_dim)`, or `(n, ..., event_dim)` with conditions.
        """
        n = non_negative_integer("n", n) if isinstance(n, int | float) or ops.ndim(n) else n
        batch = () if condition is None else ops.shape(condition)[:-1]
        seed = self.seed_generator if seed is None else seed
        z = keras.random.normal((n, *batch, self.event_dim), dtype=self.variable_dtype, seed=seed)
        rows, condition, _ = self._rows(z, condition)
        solution = self.options.solve(self.vector_field, rows, [0.0, self.t1], args=condition)
        return tf.reshape(solution.ys[-1], tf.shape(z))

    @without_autograph
    def forward(self, z: Any, condition: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps noise to data.

        Args:
            z: points of the base distribution, `(..., event_dim)`.
            condition: the condition, `(..., features)`, which broadcasts against `z`. Defaults to `None`.

        Returns:
            The data `x`, `(..., event_dim)`, and `log |det dx/dz|`, `(...)`.
        """
        x, integrals = self._solve(z, condition, [0.0, self.t1])
        return x, integrals[0]

    @without_autograph
    def inverse(self, x: Any, condition: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps data to noise.

        Args:
            x: the data, `(..., event_dim)`.
            condition: the condition, `(..., features)`, which broadcasts against `x`. Defaults to `None`.

        Returns:
            The noise `z`, `(..., event_dim)`, and `log |det dz/dx|`, `(...)`.
        """
        z, integrals = self._solve(x, condition, [self.t1, 0.0])
        return z, integrals[0]

    def as_bijector(self, condition: Any = None) -> Any:
        """Returns the map from the base to the data as a `tfp.bijectors.Bijector`.

        Each call of a method solves again, so the results follow the weights and have gradients. A density that you
        compute from a bijector therefore needs two solves. To need only one, apply your other bijectors to
        `as_distribution()` instead.

        Args:
            condition: the condition of the flow, `(..., features)`, which broadcasts. Defaults to `None`.

        Returns:
            A `tfp.bijectors.Bijector`.
        """
        return make_bijector(self, condition)

    def as_distribution(self, condition: Any = None) -> Any:
        """Returns the flow as a `tfp.distributions.Distribution`.

        `log_prob` and `experimental_sample_and_log_prob` need one solve each, and their results follow the weights.

        Args:
            condition: the conditions, `(..., features)`; their leading axes are the batch shape of the distribution.
                Defaults to `None`.

        Returns:
            A `tfp.distributions.Distribution`.
        """
        return make_distribution(self, condition)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> keras.KerasTensor:
        x, condition = (None if part is None else tf.TensorShape(part.shape) for part in split(inputs))
        return keras.KerasTensor(tuple(leading_axes(x, condition)), dtype=self.variable_dtype)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            event_dim=self.event_dim,
            t1=self.t1,
            trace=self.trace,
            noise=self.noise,
            kinetic_energy=self.kinetic_energy,
            jacobian_norm=self.jacobian_norm,
            steer=self.steer,
            objective=self.objective,
            coupling=self.coupling,
            seed=self.seed,
        )
        return config

    def _solve(
        self, x: Any, condition: Any, ts: list, energies: bool = False, training: bool | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the states at the end, and the integrals of the columns of `DensityField` over time."""
        rows, condition, shape = self._rows(x, condition)
        field = DensityField(self.vector_field, energies)
        solution = self.options.solve(
            field,
            (rows, tf.zeros((tf.shape(rows)[0], 3 if energies else 1), rows.dtype)),
            ts,
            args=(condition, self._noise(rows)),
            training=training,
        )
        rows, integrals = (y[-1] for y in solution.ys)
        return tf.reshape(rows, shape), [tf.reshape(i, shape[:-1]) for i in tf.unstack(integrals, axis=-1)]

    def _rows(self, x: Any, condition: Any) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor]:
        """Returns the vectors and their conditions as rows, and their shape, after it has built the model for them."""
        rows, condition, shape = as_rows(x, condition, self.event_dim, self.variable_dtype)
        if not self.built:
            known = tuple(rows.shape)
            self.build(known if condition is None else (known, tuple(condition.shape)))
        return rows, condition, shape

    def _noise(self, like: tf.Tensor) -> tf.Tensor | None:
        return None if self.trace == "exact" else draw_noise(self.noise, like, self.seed_generator)
