"""ReversibleAdjoint: the exact gradient of its own discrete solution, whatever the mode, without keeping the states."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from steep import MATRIX, OWN, Y0, field, gradients_of

import keras_node
from keras_node.gradients.direct import DirectGradient
from keras_node.solve import add_gradient_at_start, solve

COUPLING = 0.97
REVERSIBLE = keras_node.ReversibleAdjoint(COUPLING)


class Backpropagation(DirectGradient):
    """Ordinary backpropagation through the same steps."""

    def __call__(self, problem):
        return add_gradient_at_start(problem, solve(problem._replace(coupling=COUPLING))[0])


def rk4_change(matrix, t, dt, y):
    """The change of a step of the classical method for `dy/dt = tanh(y A) + sin(t)`, written out."""
    rate = lambda t, y: tf.tanh(y @ matrix) + tf.sin(t)  # noqa: E731
    k1 = rate(t, y)
    k2 = rate(t + dt / 2, y + dt / 2 * k1)
    k3 = rate(t + dt / 2, y + dt / 2 * k2)
    k4 = rate(t + dt, y + dt * k3)
    return dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def test_the_steps_and_their_gradient_are_those_of_the_paper():
    y0 = tf.constant([[1.0, 0.5], [0.3, -1.0]], tf.float64)
    number, dt = 50, tf.constant(0.04, tf.float64)
    weights = tf.constant([[0.3, -1.0], [0.7, 0.2]], tf.float64)

    def published(y0, matrix):
        y = z = y0
        for n in range(number):
            t = n * dt
            y = COUPLING * y + (1 - COUPLING) * z + rk4_change(matrix, t, dt, z)
            z = z - rk4_change(matrix, t + dt, -dt, y)
        return y

    def ours(y0, matrix):
        return keras_node.odeint(
            lambda t, y, matrix: tf.tanh(y @ matrix) + tf.sin(t),
            y0,
            [0.0, 2.0],
            args=matrix,
            gradient=REVERSIBLE,
            solver=keras_node.RungeKutta("rk4", num_steps=number),
        ).ys[-1]

    results = []
    for compute in (published, ours):
        with tf.GradientTape() as tape:
            tape.watch([y0, MATRIX])
            y1 = compute(y0, MATRIX)
            value = tf.reduce_sum(weights * y1)
        results.append((y1, *tape.gradient(value, [y0, MATRIX])))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("ts", "options", "mode"),
    [
        ([0.0, 1.2], {}, "eager"),
        ([1.1, 1.1, 0.6, 0.2, 0.1], {}, "eager"),
        ([0.0, 0.5, 0.51, 1.2], {"method": "dopri8"}, "eager"),
        (OWN, {"method": "dopri8", "rtol": 1e-6}, "eager"),
        (OWN, {}, "graph"),
        (OWN, {"per_sample": True}, "xla"),
        ([0.0, 0.5, 1.2], {"step_at": [0.25, 0.7]}, "eager"),
    ],
    ids=str,
)
def test_it_is_the_gradient_of_the_discrete_solution(ts, options, mode):
    solver = keras_node.RungeKutta(**{"method": "bosh3", "rtol": 1e-4, "max_steps": 256, **options})
    inputs = [Y0, MATRIX, tf.constant(ts, tf.float64)]
    stats = keras_node.odeint(field, Y0, ts, args=MATRIX, solver=solver, gradient=REVERSIBLE).stats
    assert np.max(stats.num_rejected) > 0 and np.max(stats.num_steps) > 4
    specs = tf.nest.map_structure(lambda x: tf.TensorSpec([None] * x.shape.rank, x.dtype), inputs)
    compute = lambda inputs: gradients_of(inputs, REVERSIBLE, solver)  # noqa: E731
    if mode != "eager":
        compute = tf.function(compute, input_signature=[specs], jit_compile=mode == "xla")
    for a, b in zip(compute(inputs), gradients_of(inputs, Backpropagation(), solver), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ts", [[0.0, 1.0], [0.0, 0.2, 1.0]], ids=str)
def test_a_field_may_return_the_state_itself(ts):
    y0, ts = tf.constant([[1.0, -2.0]], tf.float64), tf.constant(ts, tf.float64)
    solver = keras_node.RungeKutta("bosh3", rtol=1e-5)
    results = []
    for gradient in (REVERSIBLE, Backpropagation()):
        with tf.GradientTape() as tape:
            tape.watch([y0, ts])
            value = tf.reduce_sum(keras_node.odeint(lambda y: y, y0, ts, gradient=gradient, solver=solver).ys ** 2)
        results.append(tape.gradient(value, [y0, ts]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


@pytest.mark.parametrize(("method", "order"), [("midpoint", 2), ("bosh3", 3), ("rk4", 4)])
def test_the_order_is_that_of_the_method(method, order):
    errors = []
    for number in (8, 16):
        solver = keras_node.RungeKutta(method, num_steps=number)
        y = keras_node.odeint(
            lambda t, y: -2 * t * y, tf.ones(1, tf.float64), [0.0, 1.0], solver=solver, gradient="reversible"
        ).ys
        errors.append(abs(float(y[-1, 0]) - np.exp(-1)))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.5


@pytest.mark.parametrize(
    ("solver", "in_a_step", "at_start", "backward"),
    [
        (keras_node.RungeKutta("bosh3"), 7, 2, 6),
        (keras_node.RungeKutta("bosh3", num_steps=3), 7, 0, 6),
        (keras_node.RungeKutta("rk4", num_steps=3), 8, 0, 8),
    ],
    ids=str,
)
def test_evaluations_are_counted(solver, in_a_step, at_start, backward):
    """Two steps of the method in a step, of which only the first one needs the rate at its end."""
    calls = []

    def counted(t, y, matrix):
        calls.append(1)
        return field(t, y, matrix)

    with tf.GradientTape() as tape:
        tape.watch(Y0)
        solution = keras_node.odeint(counted, Y0, [0.0, 1.2], args=MATRIX, gradient=REVERSIBLE, solver=solver)
    steps, rejected = int(solution.stats.num_steps), int(solution.stats.num_rejected)
    assert int(solution.stats.num_evaluations) == in_a_step * (steps + rejected) + at_start
    # The field is evaluated once more to see what it reads.
    assert len(calls) == int(solution.stats.num_evaluations) + 1
    calls.clear()
    tape.gradient(solution.ys, Y0)
    assert len(calls) == backward * steps


def test_ten_thousand_steps_are_undone():
    """Rounding grows by `0.999 ** -10_000 = 22_000` at most, and nothing else is lost."""
    solver = keras_node.RungeKutta("midpoint", num_steps=10_000)
    y0 = tf.constant([[1.0, 0.0]], tf.float64)

    @tf.function(jit_compile=True)
    def run(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            rotation = lambda y: tf.stack([y[:, 1], -y[:, 0]], 1)  # noqa: E731
            y1 = keras_node.odeint(rotation, y0, [0.0, 10.0], solver=solver, gradient="reversible").ys[-1]
        return tape.gradient(y1, y0, output_gradients=tf.constant([[1.0, 0.0]], tf.float64))

    # The error of the method, 10 * dt**2 / 6 = 1.7e-6, is above that of rounding.
    np.testing.assert_allclose(run(y0)[0], [np.cos(10), np.sin(10)], atol=3e-6)


def test_in_a_layer_a_model_and_a_series():
    """The same numbers as other exact gradients of nearly the same solution."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(3)])
    solver = keras_node.RungeKutta("rk4", num_steps=4)
    x = keras.random.normal((2, 5, 3), seed=1)
    times = np.array([[0.0, 0.1, 0.4, 0.5, 0.6], [0.0, 0.2, 0.3, 0.5, 0.8]], "float32")
    cell = keras.layers.GRUCell(3)
    results = []
    for gradient in ("checkpointed", keras_node.ReversibleAdjoint()):
        layer = keras_node.ODELayer(network, solver=solver, gradient=gradient)
        rnn = keras_node.ODERNN(cell, network, solver=solver, gradient=gradient)

        @tf.function
        def slopes(layer=layer, rnn=rnn):
            with tf.GradientTape() as tape:
                value = tf.reduce_sum(layer(x[:, 0]) ** 2) + tf.reduce_sum(rnn(x, times) ** 2)
            return tape.gradient(value, network.trainable_variables)

        results.append(slopes())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    loaded = keras_node.ODELayer.from_config(layer.get_config())
    assert loaded.gradient.coupling == 0.999


def test_a_solve_that_fails_has_no_gradient():
    with tf.GradientTape() as tape:
        tape.watch(Y0)
        ys = keras_node.odeint(
            field,
            Y0,
            [0.0, 5.0],
            args=MATRIX,
            gradient=REVERSIBLE,
            throw=False,
            solver=keras_node.RungeKutta("bosh3", rtol=1e-6, max_steps=5),
        ).ys
    assert np.isnan(ys["a"][-1]).all()
    assert np.isnan(tape.gradient(ys, Y0)["a"]).all()


def test_jumps_are_differentiated():
    """Doses into `dy/dt = -k y`: `y(2) = y0 exp(-2 k) + dose exp(-k)`."""
    k, dose = tf.constant(0.5, tf.float64), tf.constant([[2.0]], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch([k, dose])
        y = keras_node.odeint(
            lambda t, y, k: -k * y,
            tf.ones((1, 1), tf.float64),
            [0.0, 2.0],
            args=k,
            jumps=([1.0], dose),
            gradient="reversible",
            solver=keras_node.RungeKutta("rk4", num_steps=20),
        ).ys[-1]
    slopes = tape.gradient(y, [k, dose])
    np.testing.assert_allclose(slopes[0], -2 * np.exp(-1) - 2 * np.exp(-0.5), rtol=1e-5)
    np.testing.assert_allclose(slopes[1], [[np.exp(-0.5)]], rtol=1e-5)


def test_what_cannot_be_reversed_is_refused():
    with pytest.raises(ValueError, match=r"above 0 and at most 1. Received: coupling=0"):
        keras_node.ReversibleAdjoint(0)
    y0 = tf.ones((2, 2))
    with pytest.raises(ValueError, match=r"explicit method.*Received.*'trbdf2'"):
        keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], solver="trbdf2", gradient="reversible")
    event = keras_node.Event(lambda y: y[:, 0] - 0.5)
    with pytest.raises(ValueError, match=r"cannot stop at events.*Received"):
        keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], event=event, gradient="reversible")
