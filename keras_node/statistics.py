"""Solver statistics where Keras users look: in the logs of `fit`, `evaluate` and their callbacks."""

import keras
import tensorflow as tf

from keras_node.solution import Stats

_KINDS = ("evaluations", "steps", "rejected", "failed")


@keras.saving.register_keras_serializable(package="keras_node")
class SolverStatistic(keras.metrics.Mean):
    """A statistic of the solves of a layer: a mean over solves and samples.

    Args:
        layer: name of the layer.
        kind: `evaluations`, `steps` or `rejected` of a solve; or `failed`, the share of solves that failed. The same
            with `backward_` in front, of the adjoint's solves.
        **kwargs: arguments of `keras.metrics.Metric`.
    """

    def __init__(self, layer: str, kind: str, **kwargs):
        super().__init__(**{"name": f"{layer}_{kind}", "dtype": "float32", **kwargs})
        self.layer = layer
        self.kind = kind

    def get_config(self):
        return {**super().get_config(), "layer": self.layer, "kind": self.kind}


class SolverStatistics:
    """The statistics of a layer, forwards and backwards.

    `fit`, `evaluate` and `predict` say whether they train. An export does not, or says no and traces the gradient all
    the same, and must not take the counters along.

    Args:
        layer: name of the layer.
        backward: whether to report what gradients solve as well.
    """

    def __init__(self, layer: str, backward: bool):
        self._reports_backward = backward
        directions = ("", "backward_") if backward else ("",)
        self.metrics = [SolverStatistic(layer, prefix + kind) for prefix in directions for kind in _KINDS]

    def forward(self, stats: Stats, status: tf.Tensor, training: bool | None) -> None:
        if training is not None:
            self._update("", stats, status)

    def backward(self, stats: Stats, status: tf.Tensor, excused: tf.Tensor, training: bool | None) -> None:
        del excused
        if training and self._reports_backward:
            self._update("backward_", stats, status)

    def _update(self, prefix, stats, status):
        values = (*stats, status != 0)
        for kind, value in zip(_KINDS, values, strict=True):
            (metric,) = (m for m in self.metrics if m.kind == prefix + kind)
            metric.update_state(tf.stop_gradient(tf.cast(value, tf.float32)))
