"""How a layer solves: the options that all layers and models with a solve inside share."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_node import gradients, solvers
from keras_node.gradients.backsolve import BacksolveAdjoint
from keras_node.gradients.checkpointed import CheckpointedAdjoint
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.reversible import ReversibleAdjoint
from keras_node.jit_compile import CompileLater, check_jit_compile
from keras_node.metrics import SolverMetric, SolverMetrics
from keras_node.nested_layers import NestedLayers, keep_frozen
from keras_node.odeint import odeint
from keras_node.solution import Solution
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.trees import Nest

# What the arguments `solver` and `gradient` may be.
Solver = RungeKutta | str
Gradient = BacksolveAdjoint | CheckpointedAdjoint | DirectGradient | ReversibleAdjoint | str


class SolveOptions:
    """The options of the solves of a layer. `keras_node.ODELayer` says what they mean.

    Args:
        name: the name of the layer.
        solver: a `keras_node.RungeKutta`, or the name of a method.
        gradient: `"backsolve"`, `"checkpointed"`, `"direct"`, `"reversible"`, or an object.
        jit_compile: `"auto"`, `True` or `False`.
        track_stats: whether to count the work of the solves, under the name of the layer.
        counts_backward: whether to count the solves of a gradient too. It must be `False` for a layer that solves in
            a loop, because TensorFlow cannot update a variable in the gradient of a loop.
    """

    # After so many seconds of tracing, tell what is going on. The whole first step takes several times as long.
    PATIENCE = 1.0

    def __init__(
        self,
        name: str,
        solver: Solver,
        gradient: Gradient | None,
        jit_compile: bool | str,
        track_stats: bool,
        counts_backward: bool,
    ) -> None:
        self.name = name
        self.jit_compile = jit_compile
        self.choose(solver, gradient)
        self.compile_later = CompileLater()
        self.metrics: SolverMetrics | None = None
        if track_stats:
            backward = counts_backward and not isinstance(self.gradient, DirectGradient)
            self.metrics = SolverMetrics(name, backward, self.solver)
        self._has_told = False

    def choose(self, solver: Solver, gradient: Gradient | None) -> None:
        """Sets the solver and the gradient. They must fit together."""
        solver, chosen = solvers.get(solver), gradients.get(gradient)
        actual = chosen or gradients.default(solver)
        gradients.check(actual, solver)
        check_jit_compile(self.jit_compile, actual)
        self.solver: RungeKutta = solver
        self.chosen_gradient = chosen

    @property
    def gradient(self) -> Any:
        """The gradient that was chosen, or else the default of the solver."""
        return self.chosen_gradient or gradients.default(self.solver)

    @property
    def when_to_compile(self) -> bool | CompileLater:
        """What `jit_compile` is for a solve of this layer."""
        return self.compile_later if self.jit_compile == "auto" else bool(self.jit_compile)

    def solve(self, vector_field: Any, y0: Nest, ts: Any, **options: Any) -> Solution:
        """Calls `keras_node.odeint` with these options. `options` override them."""
        _check_metrics_of(vector_field)
        own = {
            "solver": self.solver,
            "gradient": self.gradient,
            "jit_compile": self.when_to_compile,
            "statistics": self.metrics,
        }
        with self.telling():
            return odeint(vector_field, y0, ts, **{**own, **options})

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Logs once why the first step takes its time, if what runs inside this context is traced and is slow."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if self._has_told or seconds < self.PATIENCE or tf.executing_eagerly():
            return
        self._has_told = True
        tf.get_logger().info(
            "TensorFlow traced the solve of layer %r in %.1f seconds and traces its gradient next. The first step "
            "waits for this, and so does the first step with other shapes. To make it shorter, call "
            "`model.optimizer.build(model.trainable_variables)` before `fit`, so that Keras need not trace twice, and "
            'use a solver with few stages, such as "bosh3".',
            self.name,
            seconds,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "solver": keras.saving.serialize_keras_object(self.solver),
            "gradient": keras.saving.serialize_keras_object(self.chosen_gradient),
            "jit_compile": self.jit_compile,
            "track_stats": self.metrics is not None,
        }


class SolvingLayer(NestedLayers):
    """A layer with a solve inside. The options of the solve are attributes of the layer and part of its config."""

    options: SolveOptions

    def set_options(
        self,
        solver: Solver,
        gradient: Gradient | None,
        jit_compile: bool | str,
        track_stats: bool = False,
        counts_backward: bool = True,
    ) -> None:
        """Sets the options. The constructor of a layer calls this after the layer has got its name."""
        self.options = SolveOptions(self.name, solver, gradient, jit_compile, track_stats, counts_backward)
        self.solves_so_far = self.options.compile_later.largest_and_solves  # so that TensorFlow can save its graphs
        if self.options.metrics is not None:
            self.statistic_metrics = self.options.metrics.metrics  # Keras finds metrics that are attributes
        keep_frozen(self)

    @property
    def solver(self) -> RungeKutta:
        return self.options.solver

    @solver.setter
    def solver(self, value: Solver) -> None:
        self.options.choose(value, self.options.chosen_gradient)

    @property
    def gradient(self) -> Any:
        return self.options.gradient

    @gradient.setter
    def gradient(self, value: Gradient | None) -> None:
        self.options.choose(self.solver, value)

    @property
    def jit_compile(self) -> bool | str:
        return self.options.jit_compile

    @jit_compile.setter
    def jit_compile(self, value: bool | str) -> None:
        check_jit_compile(value, self.gradient)
        self.options.jit_compile = value

    @property
    def track_stats(self) -> bool:
        return self.options.metrics is not None

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.options.get_config()}


def _check_metrics_of(field: Any) -> None:
    """Raises for a field with layers that count their solves.

    Such a layer solves again at every evaluation of the field, so one count would mean nothing in the logs.
    """
    metrics = field.metrics if isinstance(field, keras.Layer) else ()
    nested = next((metric.layer for metric in metrics if isinstance(metric, SolverMetric)), None)
    if nested is not None:
        raise ValueError(
            "A layer inside a vector field solves at every evaluation of the field, so its statistics mean nothing in "
            "the logs: leave out its `track_stats`. "
            f"Received: a field {field!r}, in which layer {nested!r} has track_stats=True"
        )
