"""A flow as an object of TensorFlow Probability."""

from typing import Any

import keras
import tensorflow as tf

# A solve computes a state and its density together. But nothing here is kept from one call to the next, because the
# weights may change in between, or a `tf.GradientTape` may start to record. A bijector has no method that returns both,
# so it solves twice. A distribution has such a method, and solves once.


def make_bijector(flow: Any, condition: Any = None) -> Any:
    """Returns the map from the base of a `keras_node.ContinuousFlow` to its data as a `tfp.bijectors.Bijector`."""
    from tensorflow_probability import bijectors as tfb

    class FlowBijector(tfb.Bijector):
        def __init__(self) -> None:
            super().__init__(forward_min_event_ndims=1, dtype=tf.as_dtype(flow.variable_dtype), name=flow.name)

        # TensorFlow Probability caches results by the identity of the input tensor. A copy avoids an outdated result.

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(_copy(x, self.dtype), *args, **kwargs)

        def inverse(self, y: Any, *args: Any, **kwargs: Any) -> Any:
            return super().inverse(_copy(y, self.dtype), *args, **kwargs)

        def forward_log_det_jacobian(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward_log_det_jacobian(_copy(x, self.dtype), *args, **kwargs)

        def inverse_log_det_jacobian(self, y: Any, *args: Any, **kwargs: Any) -> Any:
            return super().inverse_log_det_jacobian(_copy(y, self.dtype), *args, **kwargs)

        def _forward(self, x: tf.Tensor) -> tf.Tensor:
            return flow.forward(x, condition)[0]

        def _inverse(self, y: tf.Tensor) -> tf.Tensor:
            return flow.inverse(y, condition)[0]

        def _forward_log_det_jacobian(self, x: tf.Tensor) -> tf.Tensor:
            return flow.forward(x, condition)[1]

        def _inverse_log_det_jacobian(self, y: tf.Tensor) -> tf.Tensor:
            return flow.inverse(y, condition)[1]

    return FlowBijector()


def make_distribution(flow: Any, condition: Any = None) -> Any:
    """Returns the density of a `keras_node.ContinuousFlow` as a `tfp.distributions.Distribution`."""
    from tensorflow_probability import bijectors as tfb
    from tensorflow_probability import distributions as tfd

    batch_shape = () if condition is None else keras.ops.shape(condition)[:-1]
    zeros = tf.zeros((*batch_shape, flow.event_dim), flow.variable_dtype)

    class FlowDistribution(tfd.Distribution):
        """A flow with the attributes of a `tfp.distributions.TransformedDistribution`, and one solve for a density."""

        def __init__(self) -> None:
            self.distribution = tfd.MultivariateNormalDiag(zeros, tf.ones_like(zeros))
            self.bijector = make_bijector(flow, condition)
            super().__init__(
                dtype=self.distribution.dtype,
                reparameterization_type=tfd.FULLY_REPARAMETERIZED,
                validate_args=False,
                allow_nan_stats=True,
                parameters={},
                name=flow.name,
            )

        def _sample_n(self, n: Any, seed: Any = None) -> tf.Tensor:
            return self.bijector.forward(self.distribution.sample(n, seed=seed))

        def _sample_and_log_prob(self, sample_shape: Any, seed: Any) -> tuple[tf.Tensor, tf.Tensor]:
            z, log_base = self.distribution.experimental_sample_and_log_prob(sample_shape, seed=seed)
            x, log_det = flow.forward(z, condition)
            return x, log_base - log_det

        def _log_prob(self, x: tf.Tensor) -> tf.Tensor:
            return flow.log_prob(x, condition)

        def _batch_shape(self) -> Any:
            return self.distribution.batch_shape

        def _batch_shape_tensor(self) -> Any:
            return self.distribution.batch_shape_tensor()

        def _event_shape(self) -> Any:
            return self.distribution.event_shape

        def _event_shape_tensor(self) -> Any:
            return self.distribution.event_shape_tensor()

        def _default_event_space_bijector(self) -> Any:
            return tfb.Identity(validate_args=self.validate_args)

    return FlowDistribution()


def _copy(x: Any, dtype: Any) -> tf.Tensor:
    return tf.identity(tf.convert_to_tensor(x, dtype_hint=dtype))
