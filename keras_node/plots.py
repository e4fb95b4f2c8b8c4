"""Pictures of fields, solves and training, drawn with matplotlib (`pip install "keras-node[plots]"`)."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_node.gradients.direct import DirectGradient
from keras_node.layers.ode_layer import ODELayer
from keras_node.odeint import odeint
from keras_node.solve import solve
from keras_node.vector_field import VectorField

__all__ = ["evaluations", "phase_portrait", "step_sizes", "trajectories"]


def phase_portrait(
    vector_field: keras.Layer | Callable,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    *,
    y0: Any = None,
    ts: Any = (0.0,),
    solver="tsit5",
    num_arrows: int = 20,
    ax=None,
):
    """Draws the directions of a two-dimensional field as arrows, coloured by speed, and trajectories through it.

    Args:
        vector_field: `f(y)` or `f(t, y)`, a Keras layer or a callable; it is drawn at `t = ts[0]`.
        xlim: the range of the first component, `(low, high)`.
        ylim: the range of the second component.
        y0: where trajectories start, `(N, 2)`. By default none are drawn.
        ts: the times at which trajectories are computed, `(T,)`; the lines join these points. Defaults to `(0.0,)`.
        solver: a `keras_node.RungeKutta`, or the name of a method, for the trajectories. Defaults to `"tsit5"`.
        num_arrows: how many arrows along either axis. Defaults to `20`.
        ax: the matplotlib Axes to draw into. Defaults to those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: if no `ax` is given and matplotlib is not installed; so do all functions of this module.
        ValueError: for starts that are not `(N, 2)`.

    Example:
    >>> rotation = lambda y: tf.stack([y[:, 1], -y[:, 0]], axis=1)
    >>> ax = keras_node.plots.phase_portrait(rotation, (-2, 2), (-2, 2), y0=[[1.0, 0.0]], ts=[0.0, 1.0, 2.0])
    >>> len(ax.lines)
    1
    """
    if y0 is not None and (np.ndim(y0) != 2 or np.shape(y0)[1] != 2):
        raise ValueError(f"`y0` must be states in the plane, (N, 2). Received: y0 of shape {np.shape(y0)}")
    grid = np.meshgrid(np.linspace(*xlim, num_arrows), np.linspace(*ylim, num_arrows))
    points = tf.constant(np.stack(grid, axis=-1).reshape(-1, 2), keras.config.floatx())
    time = tf.cast(ts[0], points.dtype)
    field = VectorField(vector_field, time, points)
    rates = field(time, points, field.params).numpy()
    speed = np.linalg.norm(rates, axis=1)
    directions = rates / np.where(speed > 0, speed, 1)[:, None]
    ax = _axes(ax)
    ax.quiver(*points.numpy().T, *directions.T, speed, angles="xy", pivot="mid", cmap="viridis", alpha=0.6)
    if y0 is not None:
        ys = odeint(vector_field, tf.constant(y0, points.dtype), ts, solver=solver).ys.numpy()
        for path in ys.swapaxes(0, 1):
            (line,) = ax.plot(*path.T)
            ax.scatter(*path[0], color=line.get_color(), zorder=3)
    ax.set(xlim=xlim, ylim=ylim, xlabel="$y_1$", ylabel="$y_2$")
    return ax


def trajectories(layer: ODELayer, inputs: Any, ts: Any = None, *, args: Any = None, ax=None):
    """Draws the state of an `ODELayer` against time: a line for each sample and component, components by colour.

    Args:
        layer: a `keras_node.ODELayer` whose state is one tensor.
        inputs: its input, a batch of states at `layer.t0`.
        ts: times, `(T,)` or `(batch, T)`, from `layer.t0` on. Defaults to 100 from `layer.t0` to `layer.t1`.
        args: what the layer's field takes beside the state. Defaults to `None`.
        ax: the matplotlib Axes to draw into. Defaults to those of a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: for a layer of another kind.
        ValueError: for a state that is a nest.

    Example:
    >>> layer = keras_node.ODELayer(lambda y: -y, t1=2.0)
    >>> ax = keras_node.plots.trajectories(layer, tf.ones((3, 4)))
    >>> len(ax.lines)
    12
    """
    if not isinstance(layer, ODELayer):
        raise TypeError(f"`layer` must be a `keras_node.ODELayer`. Received: layer={layer!r}")
    ts = np.linspace(layer.t0, layer.t1, 100) if ts is None else np.asarray(ts)
    states = layer(inputs, ts=ts, args=args)
    if tf.nest.is_nested(states):
        raise ValueError(f"The state must be one tensor. Received: a state of type {type(states).__name__}")
    ax = _axes(ax)
    states = keras.ops.convert_to_numpy(keras.ops.cast(states, "float64"))
    states = states.reshape(*states.shape[:2], -1)
    for times, sample in zip(np.broadcast_to(ts, states.shape[:2]), states, strict=True):
        for i, component in enumerate(sample.T):
            ax.plot(times, component, color=f"C{i % 10}", lw=1)
    ax.set(xlabel="time t", ylabel="state")
    return ax


def evaluations(history: Any, *, ax=None):
    """Draws over training how many evaluations of its field a solve took, for every layer with `track_stats=True`.

    Args:
        history: what `fit` returned, or its `history`, a dictionary of lists.
        ax: the matplotlib Axes to draw into. Defaults to those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: if there are no evaluations in it.

    Example:
    >>> layer = keras_node.ODELayer(keras.layers.Dense(2), track_stats=True)
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(tf.ones((8, 2)), tf.ones((8, 2)), epochs=3, verbose=0)
    >>> ax = keras_node.plots.evaluations(history)
    >>> len(ax.lines)  # forwards and backwards
    2
    """
    logs = history if isinstance(history, Mapping) else history.history
    curves = {name: values for name, values in logs.items() if name.endswith("_evaluations")}
    if not curves:
        raise ValueError(
            "There are no evaluations in this history: give `track_stats=True` to an ODELayer, ODERNN or ODERNNCell. "
            f"Received: history of {', '.join(logs)}"
        )
    ax = _axes(ax)
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, ".-", label=name.removesuffix("_evaluations"))
    ax.set(xlabel="epoch", ylabel="evaluations of the field in a solve", ylim=(0, None))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def step_sizes(vector_field: keras.Layer | Callable, y0: Any, ts: Any, *, args: Any = None, solver="tsit5", ax=None):
    """Solves eagerly and draws the size of every attempted step at the time at which it begins.

    Accepted steps are joined by a line, one for each sample where samples differ; a cross is a rejected one. A solve
    that fails is drawn up to where it does.

    Args:
        vector_field: as of `keras_node.odeint`.
        y0: the initial state.
        ts: times, `(T,)` or `(T, batch)`.
        args: nest of tensors for a field `f(t, y, args)`. Defaults to `None`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"`.
        ax: the matplotlib Axes to draw into. Defaults to those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: if no step is attempted: between equal times, or where the field is not finite at the start.

    Example:
    >>> ax = keras_node.plots.step_sizes(lambda y: -y, tf.constant([1.0, 2.0]), [0.0, 5.0])
    >>> times, sizes = ax.lines[0].get_data()
    >>> round(float(sum(sizes)), 4)
    5.0
    """
    steps = _AttemptedSteps()
    solution = odeint(vector_field, y0, ts, args=args, solver=solver, gradient=steps, throw=False)
    if not steps.attempted:
        raise ValueError(f"The solve attempted no step. Received: ts={ts}; status={solution.status}")
    ax = _axes(ax)
    start, size, accepted = (np.stack(np.broadcast_arrays(*column)) for column in zip(*steps.attempted, strict=True))
    start, size, accepted = (a.reshape(len(a), -1) for a in np.broadcast_arrays(start, size, accepted))
    for i in range(start.shape[1]):
        stands, fails = (chosen & (size[:, i] > 0) for chosen in (accepted[:, i], ~accepted[:, i]))
        (line,) = ax.plot(start[stands, i], size[stands, i], ".-", label="accepted" if i == 0 else None)
        if fails.any():
            ax.plot(start[fails, i], size[fails, i], "x", color=line.get_color(), label="rejected" if i == 0 else None)
    ax.set(xlabel="time t", ylabel="step size", yscale="log")
    ax.legend()
    return ax


class _AttemptedSteps(DirectGradient):
    """In the place of a gradient it is handed the problem; it solves it, and observes time, size and fate of steps."""

    def __init__(self):
        self.attempted = []

    def __call__(self, problem):
        trajectory, _ = solve(problem, observers=[self])
        return trajectory

    def start(self, y0):
        return ()

    def update(self, memory, step, progress):
        self.attempted.append((step.t.numpy(), np.abs(step.dt), progress.accepted.numpy()))
        return memory


def _axes(ax):
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('`keras_node.plots` needs matplotlib: pip install "keras-node[plots]"') from error
    return plt.figure(layout="constrained").gca()
