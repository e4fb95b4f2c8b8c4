"""How a layer solves: the options that all layers and models with a solve in them share."""

from typing import Any

import keras

from keras_node import gradients, solvers
from keras_node.gradients.direct import DirectGradient
from keras_node.jit_compile import check_jit_compile
from keras_node.metrics import SolverMetric, SolverMetrics
from keras_node.nested_layers import NestedLayers
from keras_node.odeint import odeint
from keras_node.solution import Solution
from keras_node.trees import Nest


class SolveOptions:
    """The options of the solves of a layer. What they mean is told in `keras_node.ODELayer`.

    Args:
        solver: a `keras_node.RungeKutta`, or the name of a method.
        gradient: `"backsolve"`, `"checkpointed"`, `"direct"`, or an object.
        jit_compile: `"auto"`, `True` or `False`.
        track_stats: the name under which to count the work of the solves, or `None`.
        counts_backward: whether the solves of a gradient are counted too. TensorFlow cannot update a variable in the
            gradient of a loop.
    """

    def __init__(
        self,
        solver: Any = "tsit5",
        gradient: Any = "backsolve",
        jit_compile: bool | str = "auto",
        track_stats: str | None = None,
        counts_backward: bool = True,
    ):
        self.solver = solvers.get(solver)
        self.gradient = gradients.get(gradient)
        check_jit_compile(jit_compile, self.gradient)
        self.jit_compile = jit_compile
        self.metrics = None
        if track_stats is not None:
            backward = counts_backward and not isinstance(self.gradient, DirectGradient)
            self.metrics = SolverMetrics(track_stats, backward)

    def solve(self, vector_field: Any, y0: Nest, ts: Any, **options) -> Solution:
        """`keras_node.odeint` with these options, unless others are given."""
        _check_metrics_of(vector_field)
        own = {
            "solver": self.solver,
            "gradient": self.gradient,
            "jit_compile": self.jit_compile,
            "statistics": self.metrics,
        }
        return odeint(vector_field, y0, ts, **{**own, **options})

    def get_config(self) -> dict:
        return {
            "solver": keras.saving.serialize_keras_object(self.solver),
            "gradient": keras.saving.serialize_keras_object(self.gradient),
            "jit_compile": self.jit_compile,
            "track_stats": self.metrics is not None,
        }


class SolvingLayer(NestedLayers):
    """For a layer that solves as its `options` say: they are its attributes, and part of its config."""

    options: SolveOptions

    def set_options(self, solver, gradient, jit_compile, track_stats=False, counts_backward=True):
        """To be called by the constructor of a layer, once it has a name."""
        name = self.name if track_stats else None
        self.options = SolveOptions(solver, gradient, jit_compile, name, counts_backward)
        if track_stats:
            self.statistic_metrics = self.options.metrics.metrics  # for Keras to find

    @property
    def solver(self):
        return self.options.solver

    @solver.setter
    def solver(self, value):
        self.options.solver = solvers.get(value)

    @property
    def gradient(self):
        return self.options.gradient

    @gradient.setter
    def gradient(self, value):
        self.options.gradient = gradients.get(value)
        check_jit_compile(self.options.jit_compile, self.options.gradient)

    @property
    def jit_compile(self):
        return self.options.jit_compile

    @jit_compile.setter
    def jit_compile(self, value):
        check_jit_compile(value, self.gradient)
        self.options.jit_compile = value

    @property
    def track_stats(self):
        return self.options.metrics is not None

    def get_config(self):
        return {**super().get_config(), **self.options.get_config()}


def _check_metrics_of(field: Any) -> None:
    """Refuses a field with layers that count their solves: one evaluation of many has no meaning in the logs."""
    metrics = field.metrics if isinstance(field, keras.Layer) else ()
    nested = next((metric.layer for metric in metrics if isinstance(metric, SolverMetric)), None)
    if nested is not None:
        raise ValueError(
            "A layer inside a vector field solves at every evaluation, and cannot tell the logs how often: leave out "
            f"its `track_stats`. Received: a field {field!r}, in which layer {nested!r} has track_stats=True"
        )
