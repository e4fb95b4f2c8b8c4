"""Pictures of fields, solves and training, drawn with matplotlib (`pip install "keras-node[plots]"`)."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_node.gradients.direct import DirectGradient
from keras_node.layers.ode_layer import ODELayer
from keras_node.models.dynamics_model import DynamicsModel
from keras_node.models.trajectories import prepare
from keras_node.odeint import odeint
from keras_node.signatures import call_arguments
from keras_node.solve import Problem, solve
from keras_node.solve_options import Solver
from keras_node.trees import Nest
from keras_node.vector_field import VectorField

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["evaluations", "forecast", "forecast_errors", "phase_portrait", "step_sizes", "trajectories"]


def phase_portrait(
    vector_field: keras.Layer | Callable,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    *,
    y0: Any = None,
    ts: Any = (0.0,),
    solver: Solver = "tsit5",
    num_arrows: int = 20,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws a two-dimensional vector field as arrows, coloured by speed, with trajectories through it.

    `dy/dt = f(t, y)`

    Args:
        vector_field: `f(y)` or `f(t, y)`, a Keras layer or a callable. It is drawn at the time `ts[0]`.
        xlim: the range of the first component, `(low, high)`.
        ylim: the range of the second component, `(low, high)`.
        y0: the starts of trajectories, `(N, 2)`. Defaults to `None`, which draws no trajectories.
        ts: the times at which trajectories are computed, `(T,)`, in any unit. Straight lines join these points.
            Defaults to `(0.0,)`.
        solver: a `keras_node.RungeKutta`, or the name of a method, for the trajectories. Defaults to `"tsit5"`.
        num_arrows: the number of arrows along each axis. Defaults to `20`.
        ax: the matplotlib Axes to draw into. Defaults to the Axes of a new figure.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: if `y0` is not of shape `(N, 2)`, or `ts` not of shape `(T,)`.
        TypeError: if the field takes `args`.
        ImportError: if you pass no `ax` and matplotlib is not installed.

    Example:
        >>> rotation = lambda y: tf.stack([y[:, 1], -y[:, 0]], axis=1)
        >>> ax = keras_node.plots.phase_portrait(rotation, (-2, 2), (-2, 2), y0=[[1.0, 0.0]], ts=[0.0, 1.0, 2.0])
        >>> len(ax.lines)
        1
    """
    if y0 is not None and (np.ndim(y0) != 2 or np.shape(y0)[1] != 2):
        raise ValueError(f"`y0` must hold states in the plane, with shape (N, 2). Received: y0 of shape {np.shape(y0)}")
    if np.ndim(ts) != 1:
        raise ValueError(f"`ts` must be of shape (T,), such as [0.0, 1.0]. Received: ts of shape {np.shape(ts)}")
    if call_arguments(vector_field)[0] == 3:
        raise TypeError(
            "`phase_portrait` draws a field of `(y)` or `(t, y)`: fix its `args`, for example "
            f"`lambda t, y: field(t, y, args)`. Received: {vector_field!r}"
        )
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


def trajectories(layer: ODELayer, inputs: Any, ts: Any = None, *, args: Any = None, ax: "Axes | None" = None) -> "Axes":
    """Draws the state of an `ODELayer` against time, with one line for each sample and component.

    The colour of a line shows its component.

    Args:
        layer: a `keras_node.ODELayer` whose state is one tensor.
        inputs: the input of the layer, a batch of states at `layer.t0`.
        ts: times, `(T,)` or `(batch, T)`, beginning at `layer.t0` and in its unit. Defaults to 100 times from
            `layer.t0` to `layer.t1`.
        args: the `args` of a field `f(t, y, args)`. Defaults to `None`.
        ax: the matplotlib Axes to draw into. Defaults to the Axes of a new figure.

    Returns:
        The matplotlib Axes.

    Raises:
        TypeError: if `layer` is not an `ODELayer`.
        ValueError: if its state is a nest.
        ImportError: if you pass no `ax` and matplotlib is not installed.

    Example:
        >>> layer = keras_node.ODELayer(lambda y: -y, t1=2.0)
        >>> ax = keras_node.plots.trajectories(layer, tf.ones((3, 4)))
        >>> len(ax.lines)
        12
    """
    if not isinstance(layer, ODELayer):
        raise TypeError(f"`layer` must be a `keras_node.ODELayer`. Received: layer={layer!r}")
    ts = np.linspace(layer.t0, layer.t1, 100) if ts is None else np.asarray(ts)
    states = layer(inputs, ts=ts, args=args, training=False)
    states = states[0] if layer.return_events else states
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


def evaluations(history: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the number of evaluations of the field in a solve against the epoch of training.

    There is one line for the forward solves of each layer with `track_stats=True`, and one for its backward solves if
    the layer counts them. Validation solves nothing backward, and has one line for each layer.

    Args:
        history: the return value of `fit`, or its attribute `history`, a dictionary of lists.
        ax: the matplotlib Axes to draw into. Defaults to the Axes of a new figure.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: if the history has no evaluations.
        ImportError: if you pass no `ax` and matplotlib is not installed.

    Example:
        >>> layer = keras_node.ODELayer(keras.layers.Dense(2), track_stats=True)
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(tf.ones((8, 2)), tf.ones((8, 2)), epochs=3, verbose=0)
        >>> ax = keras_node.plots.evaluations(history)
        >>> len(ax.lines)  # forward and backward solves
        2
    """
    logs = history if isinstance(history, Mapping) else history.history
    curves = {name: values for name, values in logs.items() if name.endswith("_evaluations") and np.any(values)}
    if not curves:
        raise ValueError(
            "There are no evaluations in this history: pass `track_stats=True` to a layer that solves, such as an "
            f"ODELayer, before you train. Received: a history of {', '.join(logs)}"
        )
    ax = _axes(ax)
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, ".-", label=name.removesuffix("_evaluations"))
    ax.set(xlabel="epoch", ylabel="evaluations of the field in a solve", ylim=(0, None))
    ax.locator_params(axis="x", integer=True)
    ax.legend()
    return ax


def step_sizes(
    vector_field: keras.Layer | Callable,
    y0: Nest,
    ts: Any,
    *,
    args: Any = None,
    solver: Solver = "tsit5",
    ax: "Axes | None" = None,
) -> "Axes":
    """Solves an ODE eagerly and draws the size of each attempted step against the time at which it begins.

    A line joins the accepted steps, with one line for each sample if the samples have different steps. A cross is a
    rejected step. If the solve fails, the drawing ends where it failed.

    Args:
        vector_field: as in `keras_node.odeint`.
        y0: the initial state, a float tensor or a nest of them.
        ts: times, `(T,)` or `(T, batch)`, in any unit. Step sizes have the same unit.
        args: nest of tensors for a field `f(t, y, args)`. Defaults to `None`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"`.
        ax: the matplotlib Axes to draw into. Defaults to the Axes of a new figure.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: if the solve attempts no step, because the times are equal or the field is not finite at the start.
        ImportError: if you pass no `ax` and matplotlib is not installed.

    Example:
        >>> ax = keras_node.plots.step_sizes(lambda y: -y, tf.constant([1.0, 2.0]), [0.0, 5.0])
        >>> times, sizes = ax.lines[0].get_data()
        >>> round(float(sum(sizes)), 4)
        5.0
    """
    steps = _AttemptedSteps()
    solution = odeint(vector_field, y0, ts, args=args, solver=solver, gradient=steps, throw=False)
    if not steps.attempted:
        raise ValueError(
            "The solve attempted no step: pass times that differ, and check that the field is finite at the start. "
            f"Received: ts={ts}, status={solution.status}"
        )
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


def forecast(model: DynamicsModel, x: Any, index: int = 0, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the observations of one trajectory as points, and the forecast from the first of them as lines.

    The colour shows the channel.

    Args:
        model: a `keras_node.DynamicsModel`.
        x: trajectories, as its `fit` takes them.
        index: the number of the trajectory. Defaults to `0`.
        ax: the matplotlib Axes to draw into. Defaults to the Axes of a new figure.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: if there is no trajectory with this number.
        ImportError: if you pass no `ax` and matplotlib is not installed.

    Example:
        >>> model = keras_node.DynamicsModel(units=8)
        >>> times, values = keras.ops.linspace(0.0, 1.0, 11), keras.ops.ones((4, 11, 2))
        >>> ax = keras_node.plots.forecast(model, (times, values))
        >>> len(ax.lines)  # points and a line for each channel
        4
    """
    trajectory = prepare(x, model, model.interpolation, keep_times=True)
    number = trajectory.values.shape[0]
    if not 0 <= index < number:
        raise ValueError(f"`index` must be the number of one of {number} trajectories. Received: index={index!r}")
    states, times = np.asarray(model(x))[index], np.asarray(trajectory.times)[index]
    values = np.where(trajectory.observed, trajectory.values, np.nan)[index]
    ax = _axes(ax)
    for i, (state, value) in enumerate(zip(states.T, values.T, strict=True)):
        ax.plot(times, value, ".", color=f"C{i % 10}", alpha=0.6, label=f"channel {i}, observed")
        ax.plot(times, state, color=f"C{i % 10}", label="forecast")
    ax.set(xlabel="time t", ylabel="state")
    ax.legend()
    return ax


def forecast_errors(model: DynamicsModel, x: Any, horizon: int | None = None, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the error of forecasts against the number of steps ahead, with one line for each channel.

    Args:
        model: a `keras_node.DynamicsModel`.
        x: trajectories, as its `fit` takes them.
        horizon: the number of steps to forecast, as in the method `forecast_errors` of the model. Defaults to `None`.
        ax: the matplotlib Axes to draw into. Defaults to the Axes of a new figure.

    Returns:
        The matplotlib Axes.

    Raises:
        ImportError: if you pass no `ax` and matplotlib is not installed.

    Example:
        >>> model = keras_node.DynamicsModel(units=8)
        >>> times, values = keras.ops.linspace(0.0, 1.0, 11), keras.ops.ones((4, 11, 2))
        >>> ax = keras_node.plots.forecast_errors(model, (times, values), horizon=5)
        >>> len(ax.lines)
        2
    """
    errors = model.forecast_errors(x, horizon)
    ax = _axes(ax)
    for i, error in enumerate(errors.T):
        ax.plot(range(1, len(errors) + 1), error, color=f"C{i % 10}", label=f"channel {i}")
    ax.set(xlabel="steps ahead", ylabel="root mean square error", ylim=(0, None))
    ax.legend()
    return ax


class _AttemptedSteps(DirectGradient):
    """A "gradient" that solves a problem and records the time, the size and the acceptance of each step."""

    def __init__(self) -> None:
        self.attempted: list[tuple] = []

    def __call__(self, problem: Problem) -> Any:
        trajectory, _ = solve(problem, observers=[self])
        return trajectory

    def start(self, y0: Nest) -> tuple:
        return ()

    def update(self, memory: tuple, step: Any, progress: Any) -> tuple:
        self.attempted.append((step.t.numpy(), np.abs(step.dt), progress.accepted.numpy()))
        return memory


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None and not hasattr(ax, "plot"):
        raise TypeError(
            "`ax` must be one matplotlib Axes. `plt.subplots(1, 2)` returns an array of them: pass one. "
            f"Received: a {type(ax).__name__}"
        )
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            '`keras_node.plots` needs matplotlib: run `pip install "keras-node[plots]"`. '
            "Received: an environment without matplotlib"
        ) from error
    return plt.figure(layout="constrained").gca()
