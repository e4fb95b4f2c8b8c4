"""Symplectic methods: their order, their structure, the energy they keep, and what they refuse."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import solve_ivp

import keras_node
from keras_node.solvers.tableaus import TABLEAUS

METHODS = {"leapfrog": 2, "yoshida4": 4}
Y0 = np.array([[1.0, 0.5], [0.3, -0.2]])


def pendulum(y):
    q, p = tf.split(y, 2, axis=-1)
    return tf.concat([p, -tf.sin(q)], axis=-1)


def energy(y):
    return 0.5 * y[..., 1] ** 2 - np.cos(y[..., 0])


def solve(method, y0, ts, field=pendulum, gradient=None, **steps):
    solver = keras_node.RungeKutta(method, **steps)
    return keras_node.odeint(field, tf.convert_to_tensor(y0), ts, solver=solver, gradient=gradient).ys


def driven(t, y):
    """A force that depends on time too."""
    q, p = tf.split(y, 2, axis=-1)
    return tf.concat([p, tf.cos(2 * t) - q**3], axis=-1)


@pytest.mark.parametrize(("field", "ts"), [(pendulum, [0.0, 0.7, 2.0]), (driven, [2.0, 0.7, 0.0])])
@pytest.mark.parametrize(("method", "order"), METHODS.items())
def test_the_error_falls_with_the_order(method, order, field, ts):
    rate = lambda t, y: np.asarray(field(tf.constant(t, tf.float64), y) if field is driven else field(y))  # noqa: E731
    exact = solve_ivp(rate, (ts[0], ts[-1]), Y0[0], "DOP853", t_eval=ts, rtol=1e-12, atol=1e-12).y.T
    numbers = [16, 32]
    errors = [np.abs(solve(method, Y0[:1], ts, field, num_steps=n)[:, 0] - exact).max() for n in numbers]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.3


def test_leapfrog_is_what_the_textbook_writes():
    dt, (q, p) = 0.1, Y0[0]
    for _ in range(10):
        q = q + dt / 2 * p
        p = p - dt * np.sin(q)
        q = q + dt / 2 * p
    np.testing.assert_allclose(solve("leapfrog", Y0, [0.0, 1.0], step_size=dt)[-1, 0], [q, p], rtol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_coefficients_raise(method):
    tableau = TABLEAUS[method]
    with pytest.raises(ValueError, match="`b` must sum to 1 for each half"):
        dataclasses.replace(tableau, b=(tableau.b[0] + 1e-9, *tableau.b[1:]))
    with pytest.raises(ValueError, match="must satisfy the order condition of the rooted tree"):
        dataclasses.replace(tableau, order=tableau.order + 1)
    with pytest.raises(ValueError, match="rows of `a` must sum to `c`"):
        dataclasses.replace(tableau, c=(0.1, *tableau.c[1:]))
    with pytest.raises(ValueError, match="`halves` must hold"):
        dataclasses.replace(tableau, halves=tableau.halves[1:])


@pytest.mark.parametrize(("method", "is_symplectic"), [("leapfrog", True), ("yoshida4", True), ("rk4", False)])
def test_a_step_keeps_the_symplectic_form(method, is_symplectic):
    """`M^T J M = J` for the Jacobian `M` of a step, in two dimensions of position."""
    y0 = tf.constant([[0.7, -0.4, 0.3, 0.9]], tf.float64)

    def coupled(y):
        q, p = tf.split(y, 2, axis=-1)
        return tf.concat([p, -tf.sin(q) - q * tf.reverse(q, [-1]) ** 2], axis=-1)

    with tf.GradientTape() as tape:
        tape.watch(y0)
        y1 = solve(method, y0, [0.0, 0.5], coupled, gradient="direct", num_steps=1)[-1]
    m = tape.jacobian(y1, y0).numpy()[0, :, 0]
    j = np.block([[np.zeros((2, 2)), np.eye(2)], [-np.eye(2), np.zeros((2, 2))]])
    assert (np.abs(m.T @ j @ m - j).max() < 1e-13) == is_symplectic


def test_the_energy_stays_over_a_hundred_thousand_steps():
    ts = np.linspace(0.0, 2e4, 1001)

    def errors(method):
        run = tf.function(lambda: solve(method, Y0[:1], ts, num_steps=100), jit_compile=True)
        return np.abs(energy(run().numpy()[:, 0]) - energy(Y0[0]))

    for method in METHODS:
        error = errors(method)
        assert error[-200:].max() < 1.05 * error[:200].max()
    drifting = errors("rk4")
    assert drifting[-200:].max() > 50 * drifting[1:20].max()


@pytest.mark.parametrize("method", METHODS)
def test_the_way_back_ends_at_the_start(method):
    @tf.function(jit_compile=True)
    def there_and_back(method):
        there = solve(method, Y0, [0.0, 100.0], num_steps=1000)[-1]
        return solve(method, there, [100.0, 0.0], num_steps=1000)[-1]

    np.testing.assert_allclose(there_and_back(method), Y0, atol=1e-11)
    assert np.abs(there_and_back("rk4") - Y0).max() > 1e-6


@pytest.mark.parametrize(
    ("ts", "options", "mode"),
    [
        ([0.0, 1.2], {"num_steps": 30}, "xla"),
        ([1.1, 1.1, 0.6, 0.2], {"step_size": 0.07}, "eager"),
        (np.array([[0.0, 0.2], [0.6, 0.2], [1.2, 0.9]]), {"num_steps": 5, "per_sample": True}, "graph"),
        (np.array([[0.0, 0.2], [0.6, 0.2], [1.2, 0.9]]), {"step_size": 0.2, "step_at": [0.5]}, "xla"),
    ],
    ids=str,
)
def test_the_default_gradient_is_that_of_the_discrete_solution(ts, options, mode):
    solver = keras_node.RungeKutta("yoshida4", **options)
    inputs = [tf.constant(Y0), tf.constant(1.3, tf.float64), tf.constant(ts, tf.float64)]

    def field(t, y, stiffness):
        q, p = tf.split(y, 2, axis=-1)
        return tf.concat([p, -stiffness * tf.sin(q) + tf.cos(3 * t)], axis=-1)

    def slopes(inputs, gradient):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y0, stiffness, ts = inputs
            ys = keras_node.odeint(field, y0, ts, args=stiffness, solver=solver, gradient=gradient).ys
            value = tf.reduce_sum(tf.sin(ys) * tf.reshape(tf.range(tf.size(ys), dtype=ys.dtype), tf.shape(ys)))
        return tape.gradient(value, inputs)

    compute = lambda inputs: slopes(inputs, None)  # noqa: E731
    if mode != "eager":
        specs = [tf.TensorSpec([None] * x.shape.rank, x.dtype) for x in inputs]
        specs[0] = tf.TensorSpec([None, 2], tf.float64)
        compute = tf.function(compute, input_signature=[specs], jit_compile=mode == "xla")
    for a, b in zip(compute(inputs), slopes(inputs, "direct"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_keras_fields_in_a_layer_that_is_saved(tmp_path):
    """A separable energy of `(q, p)`, whose layer is trained and read again."""
    keras.utils.set_random_seed(0)
    q, p = keras.Input((2,)), keras.Input((2,))
    potential = keras.layers.Dense(1)(keras.layers.Dense(8, activation="tanh")(q))
    field = keras_node.HamiltonianField(keras.Model([q, p], potential + keras.ops.sum(p**2, -1, keepdims=True) / 2))
    inputs = keras.Input((2,)), keras.Input((2,))
    layer = keras_node.ODELayer(field, solver=keras_node.RungeKutta("leapfrog", num_steps=8))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    x = [keras.random.normal((4, 2), seed=s) for s in (0, 1)]
    model.fit(x, x, verbose=0, batch_size=4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model(x), loaded(x), strict=True):
        np.testing.assert_array_equal(a, b)
    tight = keras_node.odeint(field, tuple(x), [0.0, 1.0], solver=keras_node.RungeKutta("dopri8", rtol=1e-6)).ys
    for a, b in zip(model(x), tight, strict=True):
        np.testing.assert_allclose(a, b[-1], atol=5e-3)


def friction(y):
    q, p = tf.split(y, 2, axis=-1)
    return tf.concat([p, -q - 0.01 * p], axis=-1)


def metric(y):
    """A mass that depends on the position, `H = p^2 (1 + q^2) / 2`."""
    q, p = tf.split(y, 2, axis=-1)
    return tf.concat([p * (1 + q**2), -q * p**2], axis=-1)


def dragged(y):
    """Positions that move by themselves."""
    q, p = tf.split(y, 2, axis=-1)
    return tf.concat([p - 0.01 * q, -tf.sin(q)], axis=-1)


@pytest.mark.parametrize(("field", "dtype"), [(friction, "float32"), (metric, "float64"), (dragged, "float32")])
def test_fields_that_are_not_separable_fail(field, dtype):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"NOT_SEPARABLE.*tsit5"):
        solve("leapfrog", Y0.astype(dtype), [0.0, 1.0], field, num_steps=4)
    solver = keras_node.RungeKutta("leapfrog", num_steps=4, per_sample=True)
    rows = tf.constant(np.array([[0.3, 0.5], [0.0, 0.0]], dtype))  # at rest at the origin, but the field is the same
    run = tf.function(lambda: keras_node.odeint(field, rows, [0.0, 1.0], solver=solver, throw=False), jit_compile=True)
    solution = run()
    assert solution.status.numpy()[0] == keras_node.Status.NOT_SEPARABLE
    assert np.isnan(solution.ys[1, 0]).all() and np.isfinite(solution.ys[0]).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"no error estimate.*'leapfrog'"):
        keras_node.RungeKutta("leapfrog")
    with pytest.raises(ValueError, match=r"backsolve.*symplectic method 'leapfrog'"):
        solve("leapfrog", Y0, [0.0, 1.0], gradient="backsolve", num_steps=2)
    with pytest.raises(ValueError, match=r"as many velocities or momenta.*Received"):
        solve("leapfrog", np.ones((2, 3)), [0.0, 1.0], lambda y: -y, num_steps=2)
    event = keras_node.Event(lambda y: y[:, 0])
    with pytest.raises(ValueError, match=r"no dense output.*Received: 1 event"):
        keras_node.odeint(pendulum, tf.constant(Y0), [0.0, 1.0], solver="leapfrog", event=event)


def test_another_method_may_solve_its_adjoint():
    solver, tight = keras_node.RungeKutta("leapfrog", num_steps=200), keras_node.RungeKutta("dopri5", rtol=1e-8)
    y0, slopes = tf.constant(Y0), []
    for gradient in (keras_node.BacksolveAdjoint(solver=tight), None):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            y1 = keras_node.odeint(pendulum, y0, [0.0, 1.0], solver=solver, gradient=gradient).ys[-1]
        slopes.append(tape.gradient(y1, y0))
    np.testing.assert_allclose(*slopes, rtol=1e-4)
