"""The work of solvers as Keras metrics, which appear in the logs of `fit`, `evaluate` and their callbacks."""

from typing import Any

import keras
import tensorflow as tf

from keras_node.solution import Stats
from keras_node.solvers.runge_kutta import RungeKutta

# The fields of `Stats`, and whether the solve failed.
_KINDS = ("evaluations", "steps", "rejected", "bound_by_stability", "factorizations", "iterations", "failed")
_OF_IMPLICIT_METHODS = ("factorizations", "iterations")


@keras.saving.register_keras_serializable(package="keras_node", name="SolverStatistic")
class SolverMetric(keras.metrics.Mean):
    """One measure of the work of the solves of a layer: the mean over solves and samples.

    Args:
        layer: name of the layer.
        kind: `evaluations`, `steps` or `rejected`, for explicit methods with adaptive steps `bound_by_stability`, and
            for implicit ones `factorizations` or `iterations`, the number of these in a solve; or `failed`, the share
            of solves that failed. With the prefix `backward_`, the same for the solves of the adjoint.
        **kwargs: arguments of `keras.metrics.Metric`.
    """

    def __init__(self, layer: str, kind: str, **kwargs: Any) -> None:
        super().__init__(**{"name": f"{layer}_{kind}", "dtype": "float32", **kwargs})
        self.layer = layer
        self.kind = kind

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "layer": self.layer, "kind": self.kind}


class SolverMetrics:
    """The metrics of the solves of a layer, forward and backward.

    The counters must not become a part of an exported function. So forward solves count only if `training` is known:
    `fit`, `evaluate` and `predict` pass it, and `model.export` may not. Backward solves count only in training,
    because `model.export` traces the gradient too, with `training=False`.

    Args:
        layer: name of the layer.
        backward: whether to report the solves of gradients as well.
        solver: the method, which tells what there is to report.
    """

    def __init__(self, layer: str, backward: bool, solver: RungeKutta) -> None:
        self._reports_backward = backward
        implicit = solver.tableau.implicit
        without = () if implicit else _OF_IMPLICIT_METHODS
        if implicit or not solver.adaptive:
            without = (*without, "bound_by_stability")
        kinds = [kind for kind in _KINDS if kind not in without]
        directions = ("", "backward_") if backward else ("",)
        self.metrics = [SolverMetric(layer, prefix + kind) for prefix in directions for kind in kinds]

    def forward(self, stats: Stats, status: tf.Tensor, training: bool | None) -> None:
        if training is not None:
            self._update("", stats, status)

    def backward(self, stats: Stats, status: tf.Tensor, excused: tf.Tensor, training: bool | None) -> None:
        del excused
        if training and self._reports_backward:
            self._update("backward_", stats, status)

    def _update(self, prefix: str, stats: Stats, status: tf.Tensor) -> None:
        values = (*stats, status != 0)
        for kind, value in zip(_KINDS, values, strict=True):
            for metric in self.metrics:
                if metric.kind == prefix + kind:
                    metric.update_state(tf.stop_gradient(tf.cast(value, tf.float32)))
