"""Pictures: what is drawn is what was solved."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import solve_ivp

import keras_node
from keras_node import plots

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

TIGHT = keras_node.RungeKutta("dopri5", rtol=1e-7, atol=1e-9)


@pytest.fixture(autouse=True)
def _close():
    plt.close("all")  # an example in a docstring leaves one
    yield
    plt.close("all")


def rotation(y):
    return tf.stack([y[:, 1], -y[:, 0]], axis=1)


def van_der_pol(t, y):
    return tf.stack([y[..., 1], 5 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], axis=-1)


def test_a_phase_portrait_shows_directions_speeds_and_trajectories():
    start, ts = [[1.0, 0.0], [0.0, 2.0]], np.linspace(0, 3, 20)
    ax = plots.phase_portrait(rotation, (-2, 2), (-1, 3), y0=start, ts=ts, solver=TIGHT, num_arrows=5)
    (arrows,) = (c for c in ax.collections if isinstance(c, matplotlib.quiver.Quiver))
    y1, y2 = np.meshgrid(np.linspace(-2, 2, 5), np.linspace(-1, 3, 5))
    np.testing.assert_allclose(arrows.X, y1.ravel())
    np.testing.assert_allclose(arrows.Y, y2.ravel())
    speed = np.hypot(y1, y2).ravel()
    np.testing.assert_allclose(arrows.get_array(), speed, rtol=1e-6)
    np.testing.assert_allclose(arrows.U * speed, y2.ravel(), atol=1e-6)
    np.testing.assert_allclose(arrows.V * speed, -y1.ravel(), atol=1e-6)
    one, two = (np.transpose(line.get_data()) for line in ax.lines)
    np.testing.assert_allclose(one, np.stack([np.cos(ts), -np.sin(ts)], 1), atol=1e-5)
    np.testing.assert_allclose(two, 2 * np.stack([np.sin(ts), np.cos(ts)], 1), atol=1e-5)


def test_a_phase_portrait_shows_a_field_at_the_first_time():
    ax = plots.phase_portrait(lambda t, y: tf.stack([t + 0 * y[:, 0], 0 * y[:, 0]], 1), (0, 1), (0, 1), ts=[-3.0])
    np.testing.assert_allclose(ax.collections[0].U, -1)
    np.testing.assert_allclose(ax.collections[0].get_array(), 3)


@pytest.mark.parametrize("own_times", [False, True])
def test_trajectories_show_every_sample_and_component(own_times):
    layer = keras_node.ODELayer(lambda t, y: -2 * t * y, t0=0.0, t1=2.0, solver=TIGHT, dtype="float64")
    inputs = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    ts = np.array([[0.0, 0.5], [1.0, 2.0], [0.3, 0.3]]) if own_times else None
    ax = plots.trajectories(layer, inputs, ts)
    assert len(ax.lines) == inputs.size
    for n, (line, start) in enumerate(zip(ax.lines, inputs.ravel(), strict=True)):
        times, states = line.get_data()
        np.testing.assert_allclose(times, ts[n // 2] if own_times else np.linspace(0, 2, 100))
        np.testing.assert_allclose(states, start * np.exp(-(times**2)), atol=1e-5)
    assert [line.get_color() for line in ax.lines[:4]] == ["C0", "C1", "C0", "C1"]


def test_evaluations_are_those_of_the_history():
    layer = keras_node.ODELayer(keras.layers.Dense(2), track_stats=True, name="ode")
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile("sgd", "mse", jit_compile=False)
    x = np.ones((8, 2), "float32")
    history = model.fit(x, x, epochs=3, validation_data=(x, x), verbose=0)
    lines = {line.get_label(): line.get_data() for line in plots.evaluations(history).lines}
    assert set(lines) == {"ode", "ode_backward", "val_ode"}  # nothing is solved backward in validation
    for name, (epochs, values) in lines.items():
        np.testing.assert_array_equal(epochs, [1, 2, 3])
        np.testing.assert_array_equal(values, history.history[f"{name}_evaluations"])
    assert np.min(lines["ode"][1]) >= 8  # a step of tsit5, and its first size


def test_step_sizes_are_those_of_the_solve():
    y0, ts = np.array([2.0, 0.0]), [0.0, 6.0]
    ax = plots.step_sizes(van_der_pol, y0, ts, solver=TIGHT)
    accepted, rejected = ax.lines
    times, sizes = accepted.get_data()
    stats = keras_node.odeint(van_der_pol, y0, ts, solver=TIGHT).stats
    assert (len(sizes), len(rejected.get_xdata())) == (stats.num_steps, stats.num_rejected)
    np.testing.assert_allclose(np.append(times, 6.0), np.concatenate([[0], np.cumsum(sizes)]), atol=1e-12)
    # The same method and tolerances choose steps alike: short ones at the same two jumps of the oscillator.
    theirs = solve_ivp(lambda t, y: van_der_pol(t, y).numpy(), ts, y0, "RK45", rtol=1e-7, atol=1e-9).t
    shortest = times[np.argmin(np.where(times > 1, sizes, np.inf))]
    assert abs(shortest - theirs[:-1][np.argmin(np.where(theirs[:-1] > 1, np.diff(theirs), np.inf))]) < 0.1
    # A rejected step is made again, shorter, from the same time.
    for time, size in zip(*rejected.get_data(), strict=True):
        assert np.any((times == time) & (sizes < size))


def test_step_sizes_of_samples_that_differ():
    rates = tf.constant([[1.0], [50.0]], tf.float64)
    solver = keras_node.RungeKutta("tsit5", per_sample=True)
    ax = plots.step_sizes(lambda y: -rates * y, tf.ones((2, 1), tf.float64), [3.0, 1.0], solver=solver)
    solution = keras_node.odeint(lambda y: -rates * y, tf.ones((2, 1), tf.float64), [3.0, 1.0], solver=solver)
    lines = [line for line in ax.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in lines] == solution.stats.num_steps.numpy().tolist()
    for line in lines:
        times, sizes = line.get_data()
        assert times[0] == 3.0
        np.testing.assert_allclose(sizes.sum(), 2.0)


def test_a_failed_solve_is_drawn_up_to_where_it_fails():
    solver = keras_node.RungeKutta("tsit5", max_steps=100)
    ax = plots.step_sizes(lambda y: y**2, np.array(1.0), [0.0, 2.0], solver=solver)  # 1 / (1 - t)
    times, sizes = ax.lines[0].get_data()
    assert abs(times[-1] - 1) < 1e-3
    assert sizes[-1] < 1e-6


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plots.phase_portrait(rotation, (-1, 1), (-1, 1), ax=ax),
        lambda ax: plots.trajectories(keras_node.ODELayer(lambda y: -y), np.ones((2, 3), "float32"), ax=ax),
        lambda ax: plots.evaluations({"ode_evaluations": [8.0, 14.0]}, ax=ax),
        lambda ax: plots.step_sizes(lambda y: -y, np.ones(3), [0.0, 1.0], ax=ax),
    ],
    ids=["phase_portrait", "trajectories", "evaluations", "step_sizes"],
)
def test_it_draws_into_the_given_axes_and_by_default_into_new_ones(draw):
    _, given = plt.subplots()
    assert draw(given) is given
    assert given.lines or given.collections
    assert plt.get_fignums() == [1]
    assert draw(None).figure is not given.figure


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.phase_portrait(rotation, (0, 1), (0, 1), y0=[1.0, 2.0]), ValueError, r"\(2,\)"),
        (lambda: plots.phase_portrait(lambda y: y[:, :1], (0, 1), (0, 1)), ValueError, "shape of the state"),
        (lambda: plots.trajectories(keras.layers.Dense(2), np.ones((1, 2))), TypeError, "Dense"),
        (lambda: plots.trajectories(keras_node.ODELayer(lambda y: y), (tf.ones((1, 2)),) * 2), ValueError, "tuple"),
        (lambda: plots.evaluations({"loss": [1.0]}), ValueError, "track_stats=True"),
        (lambda: plots.step_sizes(lambda y: y, 1.0, [1.0, 1.0]), ValueError, "no step"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
    assert not plt.get_fignums()


def test_trajectories_of_a_layer_with_events_or_penalties():
    event = keras_node.Event(lambda y: y[:, 0] - 0.5)
    noted = keras_node.ODELayer(lambda y: -y, event=event, return_events=True, solver=TIGHT)
    lines = plots.trajectories(noted, tf.ones((2, 1)), ts=[0.0, 0.5, 1.0]).lines
    np.testing.assert_allclose(lines[1].get_ydata(), [1, np.exp(-0.5), 0.5], rtol=1e-5)
    penalized = keras_node.ODELayer(rotation, kinetic_energy=0.1, solver=keras_node.RungeKutta("rk4", num_steps=2))
    assert len(plots.trajectories(penalized, tf.ones((3, 2))).lines) == 6


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.phase_portrait(rotation, (-1, 1), (-1, 1), ts=1.0), ValueError, r"`ts` must be of shape \(T,\)"),
        (lambda: plots.phase_portrait(lambda t, y, a: a * y, (-1, 1), (-1, 1)), TypeError, "fix its `args`"),
        (
            lambda: plots.phase_portrait(rotation, (-1, 1), (-1, 1), ax=plt.subplots(1, 2)[1]),
            TypeError,
            "one matplotlib Axes.*Received: a ndarray",
        ),
        (
            lambda: plots.forecast(keras_node.DynamicsModel(units=2), (np.linspace(0, 1, 3), np.ones((4, 3, 1))), 4),
            ValueError,
            "one of 4 trajectories. Received: index=4",
        ),
    ],
)
def test_mistakes_in_a_call_are_named(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
