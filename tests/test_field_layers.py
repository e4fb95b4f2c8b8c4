"""Layers that make vector fields: time as a channel, second order, and Hamilton's equations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy.special import ellipk

import keras_node
from keras_node import HamiltonianField, ODELayer, RungeKutta, SecondOrderField, TimeConcatenationField, odeint

PRECISE = RungeKutta("tsit5", rtol=1e-9, atol=1e-10)
FIXED = RungeKutta("rk4", num_steps=4)
T = tf.constant(0.0)
Y = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def mlp(units, activation="tanh"):
    return keras.Sequential([layers.Dense(8, activation=activation), layers.Dense(units)])


FIELDS = {
    "time": lambda: TimeConcatenationField(mlp(4)),
    "second order": lambda: SecondOrderField(TimeConcatenationField(mlp(2))),
    "energy": lambda: HamiltonianField(TimeConcatenationField(mlp(1))),
}


@tf.function
def path(field, y0, ts, solver=PRECISE):
    return odeint(field, y0, ts, solver=solver).ys


@keras.saving.register_keras_serializable(package="tests")
def spring(y):
    """The acceleration of `q'' = -4 q`."""
    return -4 * (y[0] if isinstance(y, tuple) else y[..., :2])


@keras.saving.register_keras_serializable(package="tests")
def pendulum(y):
    """The energy of a pendulum of length and weight 1, its angle and momentum being the halves."""
    q, p = y if isinstance(y, tuple) else keras.ops.split(y, 2, axis=-1)
    return p**2 / 2 - keras.ops.cos(q)


@pytest.mark.parametrize("own_times", [False, True])
def test_time_is_a_channel(own_times):
    network = layers.Dense(2, use_bias=False)
    network.build((None, 3))
    network.kernel.assign([[0, 0], [0, 0], [2, 6]])  # dy/dt = (2 t, 6 t)
    ends = np.array([1.0, 2.0, 3.0])
    ts = np.stack([np.zeros(3), ends]).astype("float32") if own_times else [0.0, 3.0]
    moved = odeint(TimeConcatenationField(network), tf.zeros((3, 2)), ts, solver=FIXED).ys[-1]
    squares = ends**2 if own_times else np.full(3, 9.0)
    np.testing.assert_allclose(moved, squares[:, None] * [1, 3], rtol=1e-6)


def test_it_sees_time_behind_the_state_whatever_its_rank():
    network = mlp(4)
    y = tf.reshape(Y, (3, 1, 4)) * tf.ones((1, 2, 1))
    expected = network(tf.concat([y, tf.fill((3, 2, 1), 5.0)], axis=-1))
    for t in (tf.constant(5.0), tf.fill((3, 1, 1), 5.0)):
        np.testing.assert_allclose(TimeConcatenationField(network)(t, y), expected, rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_a_spring_swings_as_cosine_and_sine(nested):
    y0, ts = tf.constant(Y, tf.float64), np.linspace(0, 3, 5)
    state = tuple(tf.split(y0, 2, axis=-1)) if nested else y0
    ys = path(SecondOrderField(spring, dtype="float64"), state, ts)
    ys = tf.concat(ys, axis=-1) if nested else ys
    q, v = np.split(Y, 2, axis=-1)
    for y, t in zip(ys, ts, strict=True):
        c, s = np.cos(2 * t), np.sin(2 * t)
        np.testing.assert_allclose(y, np.concatenate([c * q + s * v / 2, c * v - 2 * s * q], axis=-1), atol=1e-7)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pendulum_keeps_its_energy_and_its_period(nested):
    start = tf.constant([[2.0, 0.0], [1.0, 0.0]], tf.float64)
    state = tuple(tf.split(start, 2, axis=-1)) if nested else start
    field = HamiltonianField(pendulum, dtype="float64")
    periods = 4 * ellipk(np.sin(start[:, 0] / 2) ** 2)
    ts = np.linspace(np.zeros(2), 3 * periods, 4)
    ys = path(field, state, ts)
    ys = tf.concat(ys, axis=-1) if nested else ys
    np.testing.assert_allclose(ys, np.tile(start, (4, 1, 1)), atol=1e-6)
    middle = path(field, state, [0.0, 0.777])
    np.testing.assert_allclose(pendulum(tf.nest.map_structure(lambda y: y[-1], middle)), pendulum(start), atol=1e-8)


def test_its_field_turns_the_slopes_of_the_energy():
    network = mlp(1)
    field, step = HamiltonianField(network), 1e-2
    rates, energy = field(T, Y).numpy(), lambda y: network(y)[:, 0].numpy()
    slopes = np.stack([(energy(Y + step * e) - energy(Y - step * e)) / (2 * step) for e in np.eye(4, dtype="f")], -1)
    np.testing.assert_allclose(rates, np.concatenate([slopes[:, 2:], -slopes[:, :2]], axis=-1), atol=1e-4)


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_are_those_of_finite_differences(name):
    solver = RungeKutta("rk4", num_steps=20)
    for check in keras_node.gradcheck(FIELDS[name](), Y, [0.0, 1.0], solver=solver, gradient="direct", verbose=False):
        assert check.error < 1e-6 or abs(check.gradient - check.finite_difference) < 1e-9, check


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_adjoints_see_the_second_derivatives_of_an_energy(gradient):
    field = FIELDS["energy"]()
    solver = RungeKutta("tsit5", rtol=1e-9, atol=1e-10) if gradient == "backsolve" else FIXED
    for check in keras_node.gradcheck(field, Y, [0.0, 1.0], solver=solver, gradient=gradient, verbose=False):
        assert check.error < 1e-6 or abs(check.gradient - check.finite_difference) < 1e-9, check


@pytest.mark.parametrize("name", ["second order", "energy"])
def test_it_trains_in_a_layer_under_xla_and_is_saved_and_exported(name, tmp_path):
    model = keras.Sequential([keras.Input((4,)), ODELayer(FIELDS[name](), solver=FIXED), layers.Dense(1)])
    assert len(model.weights) == 6
    first = np.mean((model(Y) - 1) ** 2)
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=True)
    losses = model.fit(Y, np.ones((3, 1)), epochs=2, verbose=0).history["loss"]
    np.testing.assert_allclose(losses[0], first, rtol=1e-4)
    assert losses[1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(Y), model(Y))
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(Y[:2]), model(Y[:2]), atol=1e-6)


@pytest.mark.parametrize("kind", [TimeConcatenationField, SecondOrderField, HamiltonianField])
def test_its_config_makes_an_equal_layer(kind):
    field = kind(layers.Dense(4), name="field")
    clone = kind.from_config(field.get_config())
    assert clone.get_config() == field.get_config()
    assert clone.name == "field"


def test_under_a_mixed_policy_the_state_keeps_its_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        fields = [make() for make in FIELDS.values()]
        for field in fields:
            assert odeint(field, Y, [0.0, 0.5], solver=FIXED).ys.dtype == "float32"
            assert field.variables[0].dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="must be a Keras layer"):
        TimeConcatenationField(lambda y: y)
    with pytest.raises(ValueError, match=r"`\(y\)` or `\(t, y\)`"):
        SecondOrderField(lambda t, y, args: y)
    with pytest.raises(ValueError, match=r"`\(y\)` or `\(t, y\)`"):
        HamiltonianField(lambda t, y, args: y)
    with pytest.raises(ValueError, match=r"halves of its last axis.*Received: \(3, 3\)"):
        SecondOrderField(spring)(T, Y[:, :3])
    with pytest.raises(ValueError, match=r"must return the shape.*shape=\(3, 4\) for a state of shape \(3, 2\)"):
        SecondOrderField(lambda y: y)(T, Y)
    with pytest.raises(ValueError, match=r"one number for each sample.*Received: shape=\(3, 4\)"):
        HamiltonianField(lambda y: y)(T, Y)


@pytest.mark.parametrize("name", ["SecondOrder", "TimeConcatenation"])
def test_former_names_work_with_a_warning(name):
    former, current = getattr(keras_node, name), getattr(keras_node, f"{name}Field")
    layer = layers.Dense(4 if name == "TimeConcatenation" else 2)
    with pytest.warns(DeprecationWarning, match=f"keras_node.{name} is now called keras_node.{name}Field") as record:
        field = former(layer)
    assert record[0].filename == __file__
    assert isinstance(field, current)
    np.testing.assert_array_equal(field(T, Y), current(layer)(T, Y))
