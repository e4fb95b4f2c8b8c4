"""A flow as TensorFlow Probability sees it."""

from typing import Any

import tensorflow as tf


def make_bijector(flow: Any, condition: Any = None) -> Any:
    """Returns the map of a `keras_node.ContinuousFlow` from its base to its data as a `tfp.bijectors.Bijector`."""
    import tensorflow_probability as tfp

    class FlowBijector(tfp.bijectors.Bijector):
        def __init__(self):
            super().__init__(forward_min_event_ndims=1, dtype=tf.as_dtype(flow.variable_dtype), name=flow.name)

        def _forward(self, z):
            x, log_det = flow.forward(z, condition)
            # One solve gives both, and TensorFlow Probability looks here before it asks for the other.
            self._cache.forward_attributes(z)["ildj"] = -log_det
            return x

        def _inverse(self, x):
            z, log_det = flow.inverse(x, condition)
            self._cache.inverse_attributes(x)["ildj"] = log_det
            return z

        def _forward_log_det_jacobian(self, z):
            return flow.forward(z, condition)[1]

        def _inverse_log_det_jacobian(self, x):
            return flow.inverse(x, condition)[1]

    return FlowBijector()
