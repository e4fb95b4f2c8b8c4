"""The work of solvers where Keras users look: metrics in the logs of `fit`, `evaluate` and their callbacks."""

import keras
import tensorflow as tf

from keras_node.solution import Stats

_KINDS = ("evaluations", "steps", "rejected", "failed")


@keras.saving.register_keras_serializable(package="keras_node", name="SolverStatistic")
class SolverMetric(keras.metrics.Mean):
    """One count of the work that the solves of a layer take: a mean over solves and samples.

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


class SolverMetrics:
    """The metrics of the solves of a layer, forward and backward.

    `fit`, `evaluate` and `predict` say whether they train. `model.export` does not, or passes `training=False` and
    traces the gradient too; the counters must not become a part of the exported function.

    Args:
        layer: name of the layer.
        backward: whether to report what gradients solve as well.
    """

    def __init__(self, layer: str, backward: bool):
        self._reports_backward = backward
        directions = ("", "backward_") if backward else ("",)
        self.metrics = [SolverMetric(layer, prefix + kind) for prefix in directions for kind in _KINDS]

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
