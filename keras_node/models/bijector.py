"""A flow as TensorFlow Probability sees it."""

from typing import Any

import tensorflow as tf


def make_bijector(flow: Any, condition: Any = None) -> Any:
    """Returns the map of a `keras_node.ContinuousFlow` from its base to its data as a `tfp.bijectors.Bijector`."""
    import tensorflow_probability as tfp

    class FlowBijector(tfp.bijectors.Bijector):
        def __init__(self):
            self._solved = None, None, None
            super().__init__(forward_min_event_ndims=1, dtype=tf.as_dtype(flow.variable_dtype), name=flow.name)

        def _forward(self, z):
            x, log_det = flow.forward(z, condition)
            self._solved = z, x, log_det
            return x

        def _inverse(self, x):
            z, log_det = flow.inverse(x, condition)
            self._solved = z, x, -log_det
            return z

        # One solve gives both, and TensorFlow Probability asks for the one after the other.

        def _forward_log_det_jacobian(self, z):
            return self._solved[2] if z is self._solved[0] else flow.forward(z, condition)[1]

        def _inverse_log_det_jacobian(self, x):
            return -self._solved[2] if x is self._solved[1] else flow.inverse(x, condition)[1]

    return FlowBijector()
