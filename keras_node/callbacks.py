"""Callbacks for `fit`."""

import warnings

import keras

from keras_node.metrics import SolverMetric


class SolverMonitor(keras.callbacks.Callback):
    """Warns, or stops training, when solves fail or take too many evaluations.

    It looks after every epoch at the statistics of the layers that have `track_stats=True`, and names the layer.

    Args:
        max_evaluations: evaluations of the vector field by one solve, forwards or backwards, beyond which the mean of
            an epoch is too many. Defaults to `1000`.
        max_failed: the share of solves that may fail, from 0 to 1. Defaults to `0.0`. Solves that fail raise except
            under XLA, where their states are NaN.
        stop: whether to stop training, rather than only warn. Defaults to `False`.

    Raises:
        ValueError: when training begins and no layer of the model tracks its statistics, or several of one name do.

    Example:
    >>> layer = keras_node.ODELayer(keras.layers.Dense(2), track_stats=True)
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> model.compile("sgd", "mse")
    >>> x = tf.ones((8, 2))
    >>> history = model.fit(x, x, verbose=0, callbacks=[keras_node.SolverMonitor(max_evaluations=500)])
    >>> f"{layer.name}_evaluations" in history.history
    True
    """

    def __init__(self, max_evaluations: float = 1000, max_failed: float = 0.0, stop: bool = False):
        super().__init__()
        if not max_evaluations > 0 or not 0 <= max_failed <= 1:
            raise ValueError(
                "`max_evaluations` must be positive and `max_failed` between 0 and 1. "
                f"Received: max_evaluations={max_evaluations}, max_failed={max_failed}"
            )
        self.max_evaluations = max_evaluations
        self.max_failed = max_failed
        self.stop = stop

    def on_train_begin(self, logs=None):
        if not self._metrics():
            raise ValueError(
                "SolverMonitor finds no statistics: give `track_stats=True` to an ODELayer, ODERNN or ODERNNCell. "
                f"Received: model={self.model.name!r}"
            )
        names = [metric.name for metric in self._metrics()]
        shared = next((metric.layer for metric in self._metrics() if names.count(metric.name) > 1), None)
        if shared is not None:
            raise ValueError(
                "Layers of one name share their entries in the logs, of which only the last layer's are seen: give "
                f"layers with `track_stats=True` different names. Received: several layers {shared!r}"
            )

    def on_epoch_end(self, epoch, logs=None):
        complaints = []
        for metric in self._metrics():
            value = (logs or {}).get(metric.name)
            kind = metric.kind.removeprefix("backward_")
            way = "Backward solves" if metric.kind != kind else "Solves"
            if value is None:
                continue
            if kind == "failed" and value > self.max_failed:
                complaints.append(
                    f"{way} of layer {metric.layer!r} failed ({value:.1%} of them). Lower the learning rate, clip "
                    "gradients, raise `max_steps`, or loosen `rtol` and `atol`."
                )
            if kind == "evaluations" and value > self.max_evaluations:
                complaints.append(
                    f"{way} of layer {metric.layer!r} take {value:.0f} evaluations. The field grows stiff: loosen "
                    "`rtol` and `atol`, regularize its weights, or bound its output, e.g. by a tanh."
                )
        for complaint in complaints:
            warnings.warn(f"Epoch {epoch + 1}: {complaint}", stacklevel=2)
        if complaints and self.stop:
            self.model.stop_training = True

    def _metrics(self):
        return [metric for metric in self.model.metrics if isinstance(metric, SolverMetric)]
