"""Whether a solve notices that its field is stiff: in its statistics, its errors and the logs of `fit`."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import RungeKutta
from keras_node.solvers.tableaus import TABLEAUS

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.embedded and not tableau.implicit]


def pull(strength):
    """Is pulled to the cosine, more quickly the greater the strength."""
    return lambda t, y: -strength * (y - tf.cos(t))


def van_der_pol(t, y):
    a, b = tf.unstack(y, axis=-1)
    return tf.stack([b, 1000 * (1 - a * a) * b - a], axis=-1)


def lorenz(t, y):
    a, b, c = tf.unstack(y, axis=-1)
    return tf.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], axis=-1)


def predators(t, y):
    a, b = tf.unstack(y, axis=-1)
    return tf.stack([1.5 * a - a * b, a * b - 3 * b], axis=-1)


def share(field, y0, t1, solver, mode="xla"):
    run = {"eager": lambda f: f, "graph": tf.function, "xla": tf.function(jit_compile=True)}[mode]
    y0 = tf.constant(y0, tf.float64)
    stats = run(lambda: keras_node.odeint(field, y0, [0.0, t1], solver=solver, throw=False).stats)()
    return np.array(stats.num_bound_by_stability / stats.num_steps)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_limit_is_where_steps_begin_to_grow(method):
    limit = TABLEAUS[method].stability_limit
    for factor, grows in ((0.999, False), (1.001, True)):
        solver = RungeKutta(method, num_steps=20_000)
        decay = -factor * limit * 20_000
        y1 = tf.function(jit_compile=True)(
            lambda: keras_node.odeint(
                lambda y: decay * y,  # noqa: B023
                tf.constant(1.0, tf.float64),
                [0.0, 1.0],
                solver=solver,  # noqa: B023
                throw=False,
            ).ys[-1]
        )()
        assert (abs(y1.numpy()) > 1) == grows


@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_that_stability_bounds_are_counted(method):
    solver = RungeKutta(method, rtol=1e-2, atol=1e-4)
    assert share(pull(1e3), [0.0, 0.5], 3.0, solver) > 0.85
    assert share(van_der_pol, [[2.0, 0.0]], 1.0, solver) > 0.85
    # Accuracy bounds the steps here.
    for field, y0, t1 in ((lorenz, [1.0, 1, 1], 10.0), (predators, [1.0, 1], 20.0), (pull(1.0), [0.0, 0.5], 10.0)):
        assert share(field, y0, t1, RungeKutta(method)) < 0.2


def test_a_tight_tolerance_needs_shorter_steps_than_stability():
    stable = share(pull(30.0), [0.0], 10.0, RungeKutta("tsit5", rtol=1e-3, atol=1e-3))
    exact = share(pull(30.0), [0.0], 10.0, RungeKutta("tsit5", rtol=1e-8, atol=1e-8))
    assert stable > 0.85 and exact == 0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_each_sample_counts_for_itself(mode):
    strength = np.array([[1.0], [300.0], [50.0]])
    solver = RungeKutta("tsit5", per_sample=True)
    together = share(pull(strength), np.zeros((3, 2)), 2.0, solver, mode)
    assert together[1] > 0.9 > together[2] > 0.5 > 0.1 > together[0]
    alone = [share(pull(s), np.zeros((1, 2)), 2.0, solver, "graph")[0] for s in strength]
    np.testing.assert_allclose(together, alone)
    assert share(pull(strength), np.zeros((3, 2)), 2.0, RungeKutta("tsit5"), mode) > 0.9


def test_an_eager_error_explains_what_happened_and_nothing_else():
    def fail(field, y0, solver):
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            keras_node.odeint(field, y0, [0.0, 1.0], solver=solver)
        return str(caught.value)

    stiff = fail(pull(1e5), tf.zeros(2), RungeKutta(max_steps=60))
    assert stiff.startswith("The solve failed with status 1 (MAX_STEPS) after ")
    assert "the field is stiff. Status 1: `max_steps`" in stiff and "Status 2" not in stiff
    outside = fail(lambda y: tf.sqrt(y - 1), tf.zeros(2), RungeKutta())
    assert outside.startswith("The solve failed with status 2 (NON_FINITE) after 0 steps. Status 2: a NaN")
    assert "stiff" not in outside
    exploding = fail(tf.square, tf.constant([[0.1], [5.0], [3.0]]), RungeKutta(per_sample=True, max_steps=15))
    assert "status 1 (MAX_STEPS) in 2 of 3 samples, the first of which is number 1, after" in exploding


def test_constant_steps_and_implicit_methods_count_nothing():
    for solver in (RungeKutta("tsit5", num_steps=10), RungeKutta("kvaerno3")):
        assert share(pull(10.0), [0.0], 1.0, solver, "eager") == 0


@pytest.mark.parametrize("graph", [False, True])
def test_the_error_tells_how_many_steps_stability_bounds(graph):
    solver = RungeKutta("tsit5", max_steps=60)

    def solve():
        return keras_node.odeint(pull(1e5), tf.zeros(2), [0.0, 1.0], solver=solver).ys

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        (tf.function(solve) if graph else solve)()
    message = str(caught.value)
    steps, bound = map(int, re.search(r"after\D*(\d+)\D*steps,\D*(\d+)\D*of which", message).groups())
    assert 60 >= steps >= bound > 40
    assert "the field is stiff" in message and "esdirk43" in message


@pytest.mark.parametrize("stiff", [True, False])
def test_the_monitor_says_what_bounds_the_steps(stiff):
    x = np.ones((8, 1), "float32")
    field = keras.layers.Dense(
        1, use_bias=False, kernel_initializer=keras.initializers.Constant(-2e3 if stiff else 1.0)
    )
    solver = RungeKutta("tsit5", rtol=1e-3 if stiff else 1e-6, atol=1e-3)
    layer = keras_node.ODELayer(field, solver=solver, gradient="checkpointed", track_stats=True, name="ode")
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = keras_node.SolverMonitor(max_evaluations=10)
    expected = r"is stiff: stability.* 9\d% of the steps.*esdirk43" if stiff else "is not stiff: the tolerances"
    with pytest.warns(UserWarning, match=expected):
        logs = model.fit(x, x, verbose=0, callbacks=[monitor]).history
    assert 0 <= logs["ode_bound_by_stability"][0] <= logs["ode_steps"][0]
