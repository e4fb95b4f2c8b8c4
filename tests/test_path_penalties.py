"""Penalties on the path of an ODELayer: their values, their gradients, and where they do not belong."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import ODELayer, RungeKutta

# The step of Bogacki & Shampine (1989) and its error estimate, typed from the paper.
A = [[1 / 2], [0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]]
C = [0, 1 / 2, 3 / 4, 1]
B_ERROR = [2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8]

W = np.array([[0.4, -1.1], [0.9, 0.3]])


def points(count=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 2))


@pytest.fixture
def float64():
    """Keras adds up losses in float64."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def at(monkeypatch, fraction):
    """Puts the random time at this fraction of the way."""
    monkeypatch.setattr(keras.random, "uniform", lambda shape, dtype, seed: tf.constant(fraction, dtype))


def swirl(t, y):
    return tf.tanh(y @ tf.constant(W, y.dtype)) * (1 + tf.sin(3 * t))


def penalty(layer, *inputs, **options):
    layer(*inputs, training=True, **options)
    (loss,) = layer.losses
    return loss


@pytest.mark.parametrize("gradient", ["backsolve", "direct"])
@pytest.mark.parametrize(
    ("options", "ts", "duration"),
    [
        ({}, None, 1),
        ({"t0": 2.0, "t1": -1.0}, None, 3),  # backward in time
        ({"solver": RungeKutta("rk4", num_steps=3)}, None, 1),
        ({"solver": RungeKutta("rk4", num_steps=3), "t1": 0.0}, None, 0),
        ({"solver": RungeKutta("bosh3", per_sample=True)}, [0.5, 2.0], 2),
        ({}, np.array([[0.5, 2.0], [0.0, 0.0], [0.2, 4.0]]), np.array([2, 0, 4])),
        ({"solver": "trbdf2", "gradient": "checkpointed"}, [0.5, 2.0], 2),
    ],
    ids=str,
)
def test_a_constant_speed_has_its_square_times_the_duration(gradient, options, ts, duration):
    speeds = points()
    options = {"gradient": gradient, **options}
    layer = ODELayer(lambda t, y, args: args, kinetic_energy=0.5, dtype="float64", **options)
    found = penalty(layer, points(seed=1), ts=ts, args=speeds)
    np.testing.assert_allclose(found, 0.5 * np.mean(duration * np.sum(speeds**2, axis=1)), rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.7])
@pytest.mark.parametrize("ts", [[0.5, 1.0, 2.0], [[0.0, 0.2, 2.0], [0.5, 1.0, 1.0], [0.0, 0.0, 0.0]]])
def test_the_speed_is_that_at_the_random_time(ts, fraction, monkeypatch):
    """`y' = -y` from `x` has the speed `|x| exp(-t)`, and samples with times of their own share the fraction."""
    at(monkeypatch, fraction)
    layer = ODELayer(lambda y: -y, kinetic_energy=1.0, dtype="float64", solver=RungeKutta(rtol=1e-8, atol=1e-8))
    x, duration = points(), np.array(ts)[..., -1]
    speeds = np.sum(x**2, axis=1) * np.exp(-2 * fraction * duration)
    np.testing.assert_allclose(penalty(layer, x, ts=ts), np.mean(duration * speeds), rtol=1e-6)


def test_a_nest_has_the_sum_of_its_tensors():
    x = {"a": tf.ones((4, 3)), "b": tf.ones((4, 2, 2))}
    field = lambda y: {"a": tf.ones_like(y["a"]), "b": 2 * tf.ones_like(y["b"])}  # noqa: E731
    found = penalty(ODELayer(field, kinetic_energy=1.0, local_error=1.0), x)
    np.testing.assert_allclose(found, 3 + 4 * 4 + 0.1, rtol=1e-5)


def test_the_mean_over_random_times_is_the_integral():
    """`y' = -y`, so the time that was drawn can be read from the speed, and the integral is known."""
    x, t1 = points(), 2.0
    layer = ODELayer(lambda y: -y, t1=t1, kinetic_energy=1.0, dtype="float64", solver=RungeKutta(rtol=1e-8, atol=1e-8))
    layer(x)
    draw = tf.function(lambda: penalty(layer, tf.constant(x)))
    energies = np.array([draw() for _ in range(400)])
    squares = np.mean(np.sum(x**2, axis=1))
    times = np.sort(-np.log(energies / (t1 * squares)) / 2) / t1
    np.testing.assert_allclose(times, np.linspace(0, 1, 400), atol=1.6 / np.sqrt(400))  # Kolmogorov, 1 %
    exact = squares * (1 - np.exp(-2 * t1)) / 2
    assert abs(np.mean(energies) - exact) < 3 * np.std(energies) / np.sqrt(400)


@pytest.mark.parametrize("fraction", [0.3, 0.97])
@pytest.mark.parametrize(
    ("t1", "options"),
    [
        (1.5, {"rtol": 1e-3, "atol": 1e-4}),
        (-1.5, {"rtol": [1e-3, 1e-2], "atol": 1e-4}),
        (1.5, {"rtol": 1e-3, "atol": [1e-4, 1e-5], "per_sample": True}),
        (1.5, {"num_steps": 4}),
    ],
    ids=str,
)
def test_the_local_error_is_the_length_of_a_step_relative_to_what_its_error_allows(t1, options, fraction, monkeypatch):
    at(monkeypatch, fraction)
    x, solver, t = points(), RungeKutta("bosh3", **options), tf.constant(fraction * t1, tf.float64)
    found = penalty(ODELayer(swirl, t1=t1, solver=solver, local_error=3.0, dtype="float64"), x)

    if options.get("num_steps"):
        solver = RungeKutta("bosh3", step_size=abs(t1) / 4)
    solution = keras_node.odeint(swirl, tf.constant(x), [0.0, t, t1], solver=solver)
    steps = solution.stats.num_steps.numpy()
    assert np.all(steps > 1)
    y = solution.ys[1].numpy()
    dt = np.sign(t1) * np.minimum(abs(t1) / steps, abs(t1 - t))[..., None]
    k = [swirl(t, y).numpy()]
    for a, c in zip(A, C[1:], strict=True):
        end = y + dt * sum(weight * rate for weight, rate in zip(a, k, strict=True))
        k.append(swirl(t + c * dt, end).numpy())
    error = dt * sum(weight * rate for weight, rate in zip(B_ERROR, k, strict=True))
    scale = solver.atol + np.multiply(solver.rtol, np.maximum(abs(y), abs(end)))
    axis = 1 if solver.per_sample else None
    norm = np.sqrt(np.mean((error / scale) ** 2, axis=axis))
    assert np.all(norm > 1e-3)
    np.testing.assert_allclose(found, 3 * np.mean(np.cbrt(norm)), rtol=1e-6)


@pytest.mark.parametrize(("gradient", "mode"), [("backsolve", "eager"), ("checkpointed", "graph"), ("direct", "xla")])
def test_gradients_agree_with_finite_differences(gradient, mode, monkeypatch, float64):
    at(monkeypatch, 0.6)
    keras.utils.set_random_seed(0)
    field = keras.layers.Dense(2, "tanh", dtype="float64")
    options = {"dtype": "float64", "solver": RungeKutta("bosh3", rtol=1e-12, atol=1e-6, max_steps=128)}
    layer = ODELayer(field, gradient=gradient, kinetic_energy=1.0, local_error=5.0, **options)
    x = tf.constant(points())
    layer(x)
    assert penalty(ODELayer(field, local_error=5.0, **options), x) > 5 * 0.3  # it is not negligible
    weights = layer.trainable_variables

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = penalty(layer, x)
        return tape.gradient(value, [x, *weights])

    run = {"eager": gradients, "graph": tf.function(gradients), "xla": tf.function(gradients, jit_compile=True)}[mode]
    found, step = run(x), 1e-5
    rng = np.random.default_rng(5)
    directions, ends = [rng.normal(size=g.shape) for g in found], []
    for sign in (1, -1):
        for w, d in zip(weights, directions[1:], strict=True):
            w.assign_add(sign * step * d)
        ends.append(penalty(layer, x + sign * step * directions[0]))
        for w, d in zip(weights, directions[1:], strict=True):
            w.assign_sub(sign * step * d)
    along = sum(np.sum(g * d) for g, d in zip(found, directions, strict=True))
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-5)


def test_times_have_their_gradient(monkeypatch):
    """`y' = 1` up to `t` has the kinetic energy `t`."""
    layer = ODELayer(tf.ones_like, kinetic_energy=1.0)
    ts = tf.constant([[0.5, 1.0], [1.0, 3.0]])
    with tf.GradientTape() as tape:
        tape.watch(ts)
        loss = penalty(layer, tf.ones((2, 1)), ts=ts)
    np.testing.assert_allclose(tape.gradient(loss, ts), [[0, 0.5], [0, 0.5]], atol=1e-5)


def test_a_larger_state_does_not_count_as_a_smaller_error():
    """The error of a field of time alone depends on the state through the relative tolerance only."""
    layer = ODELayer(lambda t, y: tf.sin(9 * t) + 0 * y, local_error=1.0, solver=RungeKutta("bosh3", num_steps=3))
    x = tf.ones((3, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = penalty(layer, x)
    assert loss > 0.2
    np.testing.assert_allclose(tape.gradient(loss, x), tf.zeros_like(x), atol=1e-6)


def test_where_there_is_no_error_the_gradient_is_zero():
    field = keras.layers.Dense(2, kernel_initializer="zeros")
    layer = ODELayer(field, local_error=1.0)
    with tf.GradientTape() as tape:
        loss = penalty(layer, tf.ones((3, 2)))
    np.testing.assert_allclose(loss, 0.1)
    for gradient in tape.gradient(loss, field.trainable_variables):
        np.testing.assert_array_equal(gradient, tf.zeros_like(gradient))


@pytest.mark.parametrize("own_times", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.9999999])
def test_the_states_are_those_without_penalties(fraction, own_times, monkeypatch):
    at(monkeypatch, fraction)
    ts = np.array([[0.2, 0.5, 0.5, 1.0], [0.1, 2.0, 2.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
    ts = ts if own_times else ts[0]
    x, mask = points().astype("float32"), np.array([True, False, True])
    plain, penalized = ODELayer(swirl), ODELayer(swirl, kinetic_energy=0.1, local_error=0.1)
    expected = plain(x, ts=ts, training=True, mask=mask)
    found = penalized(x, ts=ts, training=True, mask=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(found), np.repeat(mask[:, None], 4, axis=1))


def test_the_field_is_that_of_the_solve():
    """With its noise, its mask and in training mode: here they decide the constant speed of a solve."""

    class Speed(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = keras.layers.Dropout(0.5, seed=0)

        def call(self, y, mask=None, training=None):
            speed = self.dropout(tf.ones_like(y), training=training)
            return speed if mask is None else speed * tf.cast(mask, y.dtype)[:, None]

    layer = ODELayer(Speed(), kinetic_energy=1.0)
    mask = np.array([True, False])
    for _ in range(2):
        moved = layer(tf.zeros((2, 50)), training=True, mask=mask)
        np.testing.assert_allclose(layer.losses[0], np.mean(np.sum(moved**2, axis=1)), rtol=1e-5)
        assert layer.losses[0] > 20


def test_only_training_is_penalized_and_only_it_draws():
    x = points(8).astype("float32")
    models = []
    for options in ({"kinetic_energy": 0.5, "local_error": 0.1}, {}):
        keras.utils.set_random_seed(1)
        ode = ODELayer(keras.layers.Dense(2, "tanh"), track_stats=True, name="ode", **options)
        models.append(keras.Sequential([keras.Input((2,)), ode]))
        models[-1].compile("sgd", "mse")
    penalized, plain = models
    assert [sum("seed" in v.path for v in model.variables) for model in models] == [1, 0]
    seed = penalized.layers[0].seed_generator.state.numpy()
    assert penalized.evaluate(x, x, verbose=0, return_dict=True) == plain.evaluate(x, x, verbose=0, return_dict=True)
    np.testing.assert_array_equal(penalized.layers[0].seed_generator.state, seed)
    losses = [model.fit(x, x, verbose=0).history for model in models]
    assert losses[0]["loss"][0] > losses[1]["loss"][0]
    assert losses[0]["ode_evaluations"] == losses[1]["ode_evaluations"]
    assert np.any(penalized.layers[0].seed_generator.state.numpy() != seed)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_a_penalized_model_trains_and_is_saved(policy, tmp_path, monkeypatch):
    keras.utils.set_random_seed(2)
    ode = ODELayer(keras.layers.Dense(2, "tanh"), kinetic_energy=0.5, local_error=0.1, solver="bosh3", dtype=policy)
    model = keras.Sequential([keras.Input((2,)), ode])
    model.compile("sgd", "mse", jit_compile=policy == "float64")
    x = points(16).astype("float32")
    losses = model.fit(x, x, epochs=3, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.layers[0].kinetic_energy, loaded.layers[0].local_error) == (0.5, 0.1)
    np.testing.assert_array_equal(loaded(x), model(x))
    at(monkeypatch, 0.4)
    np.testing.assert_array_equal(penalty(loaded.layers[0], x), penalty(ode, x))


def test_a_failed_solve_under_xla_is_nan():
    layer = ODELayer(swirl, kinetic_energy=1.0, local_error=1.0, solver=RungeKutta("bosh3", max_steps=1, rtol=1e-6))
    loss = tf.function(lambda x: penalty(layer, x), jit_compile=True)(tf.ones((3, 2)))
    assert np.isnan(loss)


EVENT = keras_node.Event(lambda y: y[:, 0])


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"kinetic_energy": -1.0}, None, "`kinetic_energy` must be a finite number, 0 or more. Received"),
        ({"local_error": np.inf}, None, "`local_error` must be a finite number"),
        ({"local_error": "a"}, None, "`local_error` must be a number"),
        ({"local_error": 1.0, "solver": "rk4"}, None, "'rk4' has no error estimate"),
        ({"local_error": 1.0, "solver": "trbdf2"}, None, "needs an explicit method"),
        ({"local_error": 1.0, "solver": RungeKutta("bosh3", step_at=[0.5])}, None, "step_at"),
        ({"kinetic_energy": 1.0, "event": EVENT}, None, "event"),
        ({"kinetic_energy": 1.0}, {"jumps": ([0.5], [[1.0, 1.0]])}, "jump"),
        ({"kinetic_energy": 1.0, "solver": RungeKutta("rk4", num_steps=2)}, {"ts": [0.5, 1.0]}, "step_size"),
    ],
    ids=str,
)
def test_what_has_no_penalty_is_refused(options, call, message):
    def make():
        layer = ODELayer(swirl, **options)
        return None if call is None else layer(tf.ones((2, 2)), **call)

    with pytest.raises(ValueError, match=message):
        make()
    # Without penalties, all of this is allowed.
    without = {name: value for name, value in options.items() if name in ("solver", "event")}
    ODELayer(swirl, **without)(tf.ones((2, 2)), **(call or {}))


def test_a_solver_that_is_set_later_is_checked_by_the_call():
    layer = ODELayer(swirl, local_error=1.0)
    layer.solver = "rk4"
    with pytest.raises(ValueError, match="no error estimate"):
        layer(tf.ones((2, 2)))


def test_weights_may_be_numbers_of_numpy():
    for weight in (np.float64(0.1), np.float32(0.1), np.int64(1)):
        layer = keras_node.ODELayer(lambda y: -y, kinetic_energy=weight, local_error=weight)
        assert layer.penalties and layer.kinetic_energy == weight
