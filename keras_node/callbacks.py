"""Callbacks for `fit`."""

import warnings
from typing import Any

import keras

from keras_node.arguments import number, positive_integer, positive_number
from keras_node.metrics import SolverMetric


class SolverMonitor(keras.callbacks.Callback):
    """Warns, or stops training, when solves fail or take too many evaluations.

    After each epoch it looks at the statistics of the layers that have `track_stats=True`. A warning names the layer.

    Args:
        max_evaluations: how many evaluations of the vector field a solve may take in the mean over an epoch, for
            forward and backward solves alike. A positive number. Defaults to `1000`.
        max_failed: the share of solves that may fail, from 0 to 1. Defaults to `0.0`. This matters under XLA, where a
            solve that fails returns NaN; elsewhere it raises an error.
        stop: whether to stop training as well as warn. Defaults to `False`.

    Raises:
        ValueError: for an option out of range; and when training begins, if no layer of the model tracks its
            statistics, or if several of these layers have the same name.

    Example:
        >>> layer = keras_node.ODELayer(keras.layers.Dense(2), track_stats=True)
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> model.compile("sgd", "mse")
        >>> x = tf.ones((8, 2))
        >>> history = model.fit(x, x, verbose=0, callbacks=[keras_node.SolverMonitor(max_evaluations=500)])
        >>> f"{layer.name}_evaluations" in history.history
        True
    """

    def __init__(self, max_evaluations: float = 1000, max_failed: float = 0.0, stop: bool = False) -> None:
        super().__init__()
        self.max_evaluations = positive_number("max_evaluations", max_evaluations)
        self.max_failed = number("max_failed", max_failed)
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"`max_failed` must be between 0 and 1. Received: max_failed={max_failed!r}")
        self.stop = stop

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not self._metrics():
            raise ValueError(
                "SolverMonitor finds no statistics: pass `track_stats=True` to a layer that solves, such as ODELayer. "
                f"Received: model={self.model.name!r}"
            )
        names = [metric.name for metric in self._metrics()]
        shared = next((metric.layer for metric in self._metrics() if names.count(metric.name) > 1), None)
        if shared is not None:
            raise ValueError(
                "Layers with the same name overwrite each other's entries in the logs: give the layers that have "
                f"`track_stats=True` different names. Received: several layers {shared!r}"
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        complaints = []
        for metric in self._metrics():
            value = (logs or {}).get(metric.name)
            kind = metric.kind.removeprefix("backward_")
            way = "Backward solves" if metric.kind != kind else "Solves"
            if value is None:
                continue
            advice = _advice(metric.name.removesuffix(kind), logs or {})
            if kind == "failed" and value > self.max_failed:
                complaints.append(
                    f"{way} of layer {metric.layer!r} failed ({value:.1%} of them). {advice}Lower the "
                    "learning rate, clip gradients, raise `max_steps`, or loosen `rtol` and `atol`."
                )
            if kind == "evaluations" and value > self.max_evaluations:
                complaints.append(
                    f"{way} of layer {metric.layer!r} take {value:.0f} evaluations. {advice}Loosen `rtol` and `atol`, "
                    "give an ODELayer a `kinetic_energy` or a `local_error`, which make paths that are cheap to solve, "
                    "regularize the weights, or bound the output of the field, for example with a tanh."
                )
        for complaint in complaints:
            warnings.warn(f"Epoch {epoch + 1}: {complaint}", stacklevel=2)
        if complaints and self.stop:
            self.model.stop_training = True

    def _metrics(self) -> list[SolverMetric]:
        return [metric for metric in self.model.metrics if isinstance(metric, SolverMetric)]


def _advice(prefix: str, logs: dict[str, Any]) -> str:
    """Says whether the field is stiff, if the entries of the logs that begin with `prefix` tell."""
    bound, steps = logs.get(f"{prefix}bound_by_stability"), logs.get(f"{prefix}steps")
    if bound is None or not steps:
        return ""
    if bound < steps / 2:
        return "The field is not stiff: the tolerances bound the length of the steps. "
    return (
        f"The field is stiff: stability, and not the tolerances, bounds the length of {bound / steps:.0%} of the "
        'steps. Pass an implicit method such as solver="esdirk43". '
    )


class GrowingHorizon(keras.callbacks.Callback):
    """Lets a `keras_node.DynamicsModel` begin with short forecasts, and makes them longer as it trains.

    `horizon = start + (stop - start) * epoch / (epochs - 1)`, and `stop` after these epochs

    In training, the windows of the model end after so many intervals, and what follows has no loss. A shorter horizon
    is cheaper too, and nothing is compiled again when it grows. The model keeps the last horizon.

    Args:
        start: number of intervals in the first epoch, a positive integer.
        stop: number of intervals at the end, a positive integer.
        epochs: number of epochs in which the horizon grows, a positive integer.

    Raises:
        ValueError: for an option out of range; and when training begins, for another kind of model.

    Example:
        >>> times, values = keras.ops.linspace(0.0, 1.0, 11), keras.ops.ones((4, 11, 2))
        >>> model = keras_node.DynamicsModel(units=8)
        >>> model.compile("adam")
        >>> history = model.fit((times, values), epochs=3, verbose=0, callbacks=[keras_node.GrowingHorizon(2, 10, 3)])
        >>> int(model.horizon)
        10

    Reference:

        - Rackauckas et al. (2020), "Universal Differential Equations for Scientific Machine Learning",
          arXiv:2001.04385.
    """

    def __init__(self, start: int, stop: int, epochs: int) -> None:
        super().__init__()
        self.start = positive_integer("start", start)
        self.stop = positive_integer("stop", stop)
        self.epochs = positive_integer("epochs", epochs)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        horizon = getattr(self.model, "horizon", None)
        if horizon is None:
            raise ValueError(
                "GrowingHorizon is for a `keras_node.DynamicsModel`, which has a horizon. "
                f"Received: model={self.model!r}"
            )
        part = min(1.0, epoch / max(self.epochs - 1, 1))
        horizon.assign(round(self.start + (self.stop - self.start) * part))
