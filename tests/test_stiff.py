"""Implicit methods: reference digits, SciPy, orders, gradients by finite differences, batches, modes and files."""

import dataclasses

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from scipy.integrate import solve_ivp

import keras_node
from keras_node import RungeKutta, Status
from keras_node.solvers.inverse import inverse
from keras_node.solvers.tableaus import TABLEAUS

IMPLICIT = [name for name, tableau in TABLEAUS.items() if tableau.implicit]


def robertson(t, y, k=(0.04, 3e7, 1e4)):
    a, b, c = tf.unstack(y, axis=-1)
    r = [k[0] * a, k[1] * b * b, k[2] * b * c]
    return tf.stack([-r[0] + r[2], r[0] - r[1] - r[2], r[1]], axis=-1)


def hires(t, y):
    y1, y2, y3, y4, y5, y6, y7, y8 = tf.unstack(y, axis=-1)
    rates = [
        -1.71 * y1 + 0.43 * y2 + 8.32 * y3 + 0.0007,
        1.71 * y1 - 8.75 * y2,
        -10.03 * y3 + 0.43 * y4 + 0.035 * y5,
        8.32 * y2 + 1.71 * y3 - 1.12 * y4,
        -1.745 * y5 + 0.43 * y6 + 0.43 * y7,
        -280 * y6 * y8 + 0.69 * y4 + 1.71 * y5 - 0.43 * y6 + 0.69 * y7,
        280 * y6 * y8 - 1.81 * y7,
        -280 * y6 * y8 + 1.81 * y7,
    ]
    return tf.stack(rates, axis=-1)


def van_der_pol(t, y):
    a, b = tf.unstack(y, axis=-1)
    return tf.stack([b, 1000 * (1 - a * a) * b - a], axis=-1)


def oregonator(t, y):
    a, b, c = tf.unstack(y, axis=-1)
    return tf.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)], axis=-1)


# Rate constants of POLLU, and its reactions: the substances that react, and those that they become.
POLLUTION = [
    (0.35, [1], [2, 3]),
    (26.6, [2, 4], [1]),
    (12300.0, [5, 2], [1, 6]),
    (0.00086, [7], [5, 5, 8]),
    (0.00082, [7], [8]),
    (15000.0, [7, 6], [5, 8]),
    (0.00013, [9], [5, 8, 10]),
    (24000.0, [9, 6], [11]),
    (16500.0, [11, 2], [1, 10, 12]),
    (9000.0, [11, 1], [13]),
    (0.022, [13], [1, 11]),
    (12000.0, [10, 2], [1, 14]),
    (1.88, [14], [5, 7]),
    (16300.0, [1, 6], [15]),
    (4800000.0, [3], [4]),
    (0.00035, [4], [16]),
    (0.0175, [4], [3]),
    (1e8, [16], [6, 6]),
    (4.44e11, [16], [3]),
    (1240.0, [17, 6], [5, 18]),
    (2.1, [19], [2]),
    (5.78, [19], [1, 3]),
    (0.0474, [1, 4], [19]),
    (1780.0, [19, 1], [20]),
    (3.12, [20], [1, 19]),
]


def pollution(t, y):
    constants = tf.constant([constant for constant, _, _ in POLLUTION], y.dtype)
    educts = [[substance - 1 for substance in educts] for _, educts, _ in POLLUTION]
    first = tf.gather(y, [pair[0] for pair in educts], axis=-1)
    second = tf.where([len(pair) == 2 for pair in educts], tf.gather(y, [pair[-1] for pair in educts], axis=-1), 1.0)
    changes = np.zeros((25, 20))
    for i, (_, before, after) in enumerate(POLLUTION):
        np.subtract.at(changes[i], np.array(before) - 1, 1)
        np.add.at(changes[i], np.array(after) - 1, 1)
    return tf.linalg.matvec(tf.constant(changes.T, y.dtype), constants * first * second)


# The digits are those of the "Test Set for IVP Solvers", Bari, and of Hairer & Wanner, IV.10.
PROBLEMS = {
    "robertson 40": (
        robertson,
        [1.0, 0, 0],
        40.0,
        [0.715827068719401, 9.18553476455775e-06, 0.284163745745829],
        (1e-8, 1e-13, 1e-8),
    ),
    "robertson 1e11": (
        robertson,
        [1.0, 0, 0],
        1e11,
        [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050],
        (1e-13, 1e-19, 1e-8),
    ),
    "hires": (
        hires,
        [1.0, 0, 0, 0, 0, 0, 0, 0.0057],
        321.8122,
        [
            0.0007371312573325668,
            0.0001442485726316185,
            5.888729740967575e-05,
            0.001175651343283149,
            0.002386356198831331,
            0.006238968252742796,
            0.002849998395185769,
            0.002850001604814231,
        ],
        1e-9,
    ),
    "van der pol": (van_der_pol, [2.0, 0], 2000.0, [1.706167732170469, -0.8928097010248125e-3], 1e-9),
    "oregonator": (oregonator, [1.0, 2, 3], 360.0, [1.000814870318523, 1228.178521549917, 132.0554942846706], 1e-6),
    "pollution": (
        pollution,
        [0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01, 0, 0, 0, 0, 0, 0, 0, 0.007, 0, 0, 0],
        60.0,
        [0.05646255480022769, 0.1342484130422339, 0.4139734331099427e-8, 0.005523140207484359],
        1e-12,
    ),
}


def relative_error(actual, expected):
    return np.max(np.abs(np.asarray(actual) - expected) / np.abs(expected))


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("kvaerno3", "robertson 40"),
        ("esdirk43", "robertson 40"),
        ("kvaerno3", "robertson 1e11"),
        ("esdirk54", "robertson 1e11"),
        ("esdirk43", "hires"),
        ("esdirk54", "hires"),
        ("kvaerno3", "van der pol"),
        ("esdirk54", "van der pol"),
        ("esdirk43", "oregonator"),
        ("esdirk54", "oregonator"),
        ("kvaerno3", "pollution"),
    ],
)
def test_reference_digits(method, problem):
    field, y0, t1, expected, atol = PROBLEMS[problem]
    rtol = 1e-5 if method == "kvaerno3" else 1e-6
    solver = RungeKutta(method, rtol=rtol, atol=atol, max_steps=50_000)

    @tf.function(jit_compile=True)
    def solve():
        return keras_node.odeint(field, tf.constant(y0, tf.float64), [0.0, t1], solver=solver, throw=False)

    solution = solve()
    assert solution.status == Status.SUCCESS
    # At this tolerance, Radau of SciPy is wrong by up to 1e-3, at the relaxation oscillations of the oregonator.
    # Of the pollution problem, only the first four substances are known.
    assert relative_error(solution.ys[-1, : len(expected)], expected) < (3e-3 if problem == "oregonator" else 3e-4)


@pytest.mark.parametrize("method", IMPLICIT)
def test_the_error_falls_with_the_order_of_the_method(method):
    def error(num_steps):
        solver = RungeKutta(method, num_steps=num_steps, rtol=1e-13, atol=1e-13, max_newton_iterations=20)
        y0 = tf.constant([[1.0, 0.3], [0.5, -1.0]], tf.float64)

        def field(t, y):
            return tf.stack([y[:, 1] - y[:, 0] ** 2, tf.sin(t) - y[:, 0]], axis=1)

        y1 = tf.function(lambda: keras_node.odeint(field, y0, [0.0, 2.0], solver=solver).ys[-1])()
        for i in range(2):
            exact = solve_ivp(lambda t, y: [y[1] - y[0] ** 2, np.sin(t) - y[0]], (0, 2), y0[i], rtol=1e-13, atol=1e-14)
            errors.append(np.abs(exact.y[:, -1] - y1[i]).max())
        return max(errors[-2:])

    errors = []
    coarse, fine = error(8), error(16)
    assert abs(np.log2(coarse / fine) - TABLEAUS[method].order) < 0.45


def test_the_order_falls_on_a_stiff_problem():
    """Prothero & Robinson (1974): the stages have order 2 only, and this is what a very stiff problem sees."""

    def error(num_steps):
        def field(t, y):
            return -1e6 * (y - tf.cos(t)) - tf.sin(t)

        solver = RungeKutta("esdirk54", num_steps=num_steps, rtol=1e-12, atol=1e-12)
        return abs(
            float(keras_node.odeint(field, tf.constant([1.0], tf.float64), [0.0, 1.0], solver=solver).ys[-1])
            - np.cos(1)
        )

    orders = np.log2(error(4) / error(8))
    assert error(8) < 1e-7 and 0.5 < orders < 3.5


@pytest.mark.parametrize("method", IMPLICIT)
def test_dense_output_is_as_exact_as_the_steps(method):
    ts = np.linspace(0, 5, 31)
    y0 = np.array([1.0, 0.1])
    exact = solve_ivp(
        lambda t, y: [-100 * (y[0] - y[1]), y[0] * np.cos(t) - y[1] ** 2],
        (0, 5),
        y0,
        "Radau",
        ts,
        rtol=1e-10,
        atol=1e-12,
    )

    def field(t, y):
        return tf.stack([-100 * (y[0] - y[1]), y[0] * tf.cos(t) - y[1] ** 2])

    solver = RungeKutta(method, rtol=1e-5, atol=1e-8)
    solution = tf.function(lambda: keras_node.odeint(field, tf.constant(y0), ts, solver=solver))()
    assert solution.stats.num_steps < 700
    np.testing.assert_allclose(solution.ys, exact.y.T, atol=2e-4)


def test_a_batch_of_very_different_stiffness_equals_each_sample_alone():
    rates = tf.constant([[1.0], [1e3], [1e7], [0.0]], tf.float64)

    def field(t, y, k):
        return -k * (y - tf.cos(t)) - y**3

    solver = RungeKutta("esdirk43", per_sample=True, rtol=1e-5, atol=1e-7)
    y0 = tf.constant([[0.3, 1.0]] * 4, tf.float64)
    solve = tf.function(lambda y0, k: keras_node.odeint(field, y0, [0.0, 1.0, 2.0], args=k, solver=solver))
    together = solve(y0, rates)
    for i in range(4):
        alone = solve(y0[i : i + 1], rates[i : i + 1])
        # Some processors round functions of one number and of four differently, and stiffness multiplies that.
        np.testing.assert_allclose(alone.ys[:, 0], together.ys[:, i], rtol=1e-9)
        for mine, all_of_them in zip(alone.stats, together.stats, strict=True):
            assert mine[0] == all_of_them[i]
    exact = solve_ivp(
        lambda t, y: -1e7 * (y - np.cos(t)) - y**3, (0, 2), [0.3, 1.0], "Radau", [1, 2], rtol=1e-9, atol=1e-11
    )
    # No step ends at the first of these times, and the error of the state between steps is not controlled.
    np.testing.assert_allclose(together.ys[1, 2], exact.y[:, 0], rtol=2e-3)
    np.testing.assert_allclose(together.ys[2, 2], exact.y[:, 1], rtol=1e-5)


def test_statistics_count_factorizations_and_iterations():
    def field(t, y):
        return -y  # linear: the second iteration of the first stage shows that the first one was exact

    solver = RungeKutta("trbdf2", num_steps=5)
    stats = keras_node.odeint(field, tf.ones((4, 2)), [0.0, 1.0], solver=solver).stats
    assert stats.num_steps == stats.num_factorizations == 5
    assert 2 * 5 <= stats.num_iterations <= 4 * 5
    assert stats.num_evaluations == 1 + stats.num_factorizations + stats.num_iterations
    explicit = keras_node.odeint(field, tf.ones((4, 2)), [0.0, 1.0]).stats
    assert explicit.num_factorizations == explicit.num_iterations == 0


@pytest.mark.parametrize("backward", [False, True])
def test_time_runs_either_way_and_the_state_may_be_a_nest(backward):
    ts = [1.0, 0.0] if backward else [0.0, 1.0]
    sign = 1 if backward else -1

    def field(t, y):
        return {"a": sign * 50 * y["a"], "b": (y["a"][:, 0], sign * y["b"][1] * y["a"][:, 0, None])}

    y0 = {"a": tf.ones((3, 1), tf.float64), "b": (tf.zeros(3, tf.float64), tf.ones((3, 2), tf.float64))}
    solver = RungeKutta("esdirk54", rtol=1e-7, atol=1e-9)
    ys = tf.function(lambda y0: keras_node.odeint(field, y0, ts, solver=solver).ys)(y0)
    y1 = tf.nest.map_structure(lambda y: y[-1], ys)
    integral = (1 - np.exp(-50)) / 50
    np.testing.assert_allclose(y1["a"], np.full((3, 1), np.exp(-50)), atol=1e-8)
    np.testing.assert_allclose(y1["b"][0], np.full(3, -sign * integral), rtol=1e-6)
    np.testing.assert_allclose(y1["b"][1], np.full((3, 2), np.exp(-integral)), rtol=1e-6)


def test_samples_may_have_their_own_times_and_steps_may_end_at_jumps():
    def level(t):
        return tf.where(t < 0.5, 0.0, 1.0)

    def field(t, y):
        return -1e4 * (y - level(t))

    solver = RungeKutta("kvaerno3", step_at=[0.5], rtol=1e-6)
    ts = np.array([[0.0, 0.2], [0.4, 0.6], [2.0, 1.0]], "float32")
    ys = tf.function(lambda y0: keras_node.odeint(field, y0, ts, solver=solver).ys)(tf.zeros((2, 1)))
    np.testing.assert_allclose(ys[..., 0], [[0, 0], [0, 1], [1, 1]], atol=1e-4)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_all_modes_agree_in_float32(mode):
    run = {"eager": lambda f: f, "graph": tf.function, "xla": tf.function(jit_compile=True)}[mode]
    solver = RungeKutta("esdirk54", rtol=1e-4, atol=(1e-6, 1e-10, 1e-6))
    solution = run(lambda: keras_node.odeint(robertson, tf.constant([[1.0, 0, 0]]), [0.0, 40.0], solver=solver))()
    assert relative_error(solution.ys[-1, 0], PROBLEMS["robertson 40"][3]) < 1e-3
    assert solution.stats.num_steps < 60


# Gradients


def kinetics(t, y, k):
    a, b, c = tf.unstack(y, axis=-1)
    t = tf.reshape(t, tf.shape(t)[:1]) if t.shape.rank else t
    r = [k[0] * a, k[1] * b * b, k[2] * b * c * (1 + 0.1 * tf.sin(t))]
    return tf.stack([-r[0] + r[2], r[0] - r[1] - r[2], r[1]], axis=-1)


Y0 = tf.constant([[1.0, 0.1, 0.2], [0.5, 0.3, 0.2]], tf.float64)
K = tf.constant([0.4, 300.0, 100.0], tf.float64)
TS = tf.constant([0.0, 0.7, 2.0], tf.float64)


def loss(y0, k, ts, solver, gradient=None):
    ys = keras_node.odeint(kinetics, y0, ts, args=k, solver=solver, gradient=gradient, throw=False).ys
    return tf.reduce_sum(ys[1:] ** 2 * tf.constant([[1.0, 30.0, 2.0], [0.5, -20.0, 1.0]], tf.float64))


def derivative(function):
    def gradient(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            value = function(*arguments)
        return tape.gradient(value, arguments)

    return gradient


def differences(function, arguments):
    """Central differences along one random direction in each argument."""
    rng, results = np.random.default_rng(0), []
    for i, x in enumerate(arguments):
        direction = rng.normal(size=x.shape) * np.abs(x)
        if i == 2:
            direction[0] = 0
        step = 1e-4
        shifted = [[*arguments[:i], x + s * step * direction, *arguments[i + 1 :]] for s in (1, -1)]
        results.append((direction, (function(*shifted[0]) - function(*shifted[1])) / (2 * step)))
    return results


@pytest.mark.parametrize(
    ("gradient", "mode", "method", "per_sample"),
    [
        (None, "graph", "esdirk54", False),
        (None, "xla", "kvaerno3", True),
        (None, "eager", "trbdf2", False),
        ("direct", "graph", "trbdf2", True),
        ("direct", "xla", "trbdf2", False),
    ],
)
def test_first_derivatives_equal_finite_differences(gradient, mode, method, per_sample):
    # Constant steps make the discrete solution a smooth function, so the differences are exact.
    options = {"step_size": 0.1, "max_steps": 32} if per_sample else {"num_steps": 5}
    solver = RungeKutta(method, rtol=1e-11, atol=1e-13, max_newton_iterations=30, per_sample=per_sample, **options)
    run = {"eager": lambda f: f, "graph": tf.function, "xla": tf.function(jit_compile=True)}[mode]
    gradients = run(derivative(lambda *x: loss(*x, solver, gradient)))(Y0, K, TS)
    value = tf.function(lambda *x: loss(*x, solver))
    # The grid of `step_size` moves with the times in another way than the derivative of a single step tells.
    arguments = 2 if per_sample else 3
    for g, (direction, expected) in list(zip(gradients, differences(value, (Y0, K, TS)), strict=True))[:arguments]:
        np.testing.assert_allclose(np.sum(g * direction), expected, rtol=2e-6)


@pytest.mark.parametrize(("gradient", "mode"), [(None, "graph"), ("direct", "eager")])
def test_second_derivatives_equal_finite_differences(gradient, mode):
    solver = RungeKutta("trbdf2", num_steps=4, rtol=1e-11, atol=1e-13, max_newton_iterations=30)
    # A short field on one interval, since the second derivative has all of it many times.
    arguments = Y0[:, :2], K[:2], TS[::2]

    def loss(y0, k, ts):
        field = lambda t, y, k: -k * (y - tf.cos(t)) * y  # noqa: E731
        ys = keras_node.odeint(field, y0, ts, args=k, solver=solver, gradient=gradient, throw=False).ys
        return tf.reduce_sum(ys[1] ** 2 * tf.constant([1.0, 30.0], tf.float64))

    first = derivative(loss)

    def size(*x):
        return sum(tf.reduce_sum((g * a) ** 2) for g, a in zip(first(*x), arguments, strict=True))

    second = derivative(size) if mode == "eager" else tf.function(derivative(size))
    gradients = second(*arguments)
    for g, (direction, expected) in zip(gradients, differences(tf.function(size), arguments), strict=True):
        np.testing.assert_allclose(np.sum(g * direction), expected, rtol=1e-5)


def test_adaptive_gradients_approach_those_of_the_exact_solution():
    solver, tight = RungeKutta("esdirk54", rtol=1e-6, atol=1e-9), RungeKutta("tsit5", rtol=1e-9, atol=1e-12)
    ours = tf.function(derivative(lambda *x: loss(*x, solver)))(Y0, K, TS)
    exact = tf.function(derivative(lambda *x: loss(*x, tight, "checkpointed")))(Y0, K, TS)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_backsolve_is_refused_with_the_reason():
    y0 = tf.ones((2, 1))
    for gradient, solver in [
        ("backsolve", "kvaerno3"),
        (keras_node.BacksolveAdjoint(solver="trbdf2"), "tsit5"),
    ]:
        with pytest.raises(ValueError, match=r"grows just as quickly(.|\n)*Received: gradient="):
            keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], solver=solver, gradient=gradient)
    layer = keras_node.ODELayer(keras.layers.Dense(1))
    with pytest.raises(ValueError, match="Received: gradient="):
        keras_node.ODELayer(keras.layers.Dense(1), gradient="backsolve").solver = "esdirk54"
    layer.solver = "esdirk54"
    assert isinstance(layer.gradient, keras_node.CheckpointedAdjoint)
    layer.solver = "bosh3"
    assert isinstance(layer.gradient, keras_node.BacksolveAdjoint)


# Failures


def test_newtons_method_that_fails_makes_the_step_shorter_or_ends_the_solve():
    def field(y):
        return -50 * y**3

    y0 = tf.constant([[2.0]], tf.float64)
    constant = RungeKutta("trbdf2", num_steps=1, max_newton_iterations=3)
    solution = keras_node.odeint(field, y0, [0.0, 1.0], solver=constant, throw=False)
    assert solution.status == Status.NO_CONVERGENCE
    assert np.isnan(solution.ys[-1])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Newton.{1,4}s method did not converge"):
        keras_node.odeint(field, y0, [0.0, 1.0], solver=constant)
    # Any error would be accepted, so it is Newton's method that rejects.
    adaptive = RungeKutta("trbdf2", max_newton_iterations=3, first_step=1.0, rtol=10, newton_tolerance=1e-5)
    solution = keras_node.odeint(field, y0, [0.0, 1.0], solver=adaptive)
    assert solution.stats.num_rejected > 0
    np.testing.assert_allclose(solution.ys[-1], [[0.25 / np.sqrt(6.265625)]], rtol=0.2)


def test_one_bad_sample_fails_alone():
    def field(t, y):
        return tf.where(y > 5, tf.constant(np.nan, y.dtype), y)

    y0 = tf.constant([[1.0], [4.0]], tf.float64)
    solver = RungeKutta("kvaerno3", per_sample=True)
    solve = tf.function(lambda y0: keras_node.odeint(field, y0, [0.0, 1.0], solver=solver, throw=False))
    solution = solve(y0)
    assert list(solution.status.numpy()) == [Status.SUCCESS, Status.NON_FINITE]
    np.testing.assert_allclose(solution.ys[-1, 0], [np.e], rtol=2e-3)
    assert np.isnan(solution.ys[-1, 1])


@pytest.mark.parametrize("per_sample", [False, True])
def test_constant_steps_end_at_a_value_that_is_not_a_number(per_sample):
    def field(t, y):
        return tf.where(t > 0.5, np.nan, -y)

    options = {"step_size": 0.25, "per_sample": True} if per_sample else {"num_steps": 4}
    solution = keras_node.odeint(
        field, tf.ones((2, 1)), [0.0, 1.0], solver=RungeKutta("trbdf2", **options), throw=False
    )
    assert np.all(solution.status == Status.NON_FINITE)
    assert np.isnan(solution.ys[-1]).all()


def test_a_state_of_many_numbers():
    matrix = tf.constant(np.random.default_rng(0).normal(size=(40, 40)) - 50 * np.eye(40))
    y0 = np.random.default_rng(1).normal(size=(2, 40))
    solver = RungeKutta("esdirk54", rtol=1e-8, atol=1e-10)
    y1 = tf.function(
        lambda: keras_node.odeint(lambda y: y @ matrix, tf.constant(y0), [0.0, 0.05], solver=solver).ys[-1]
    )()
    np.testing.assert_allclose(y1, y0 @ scipy.linalg.expm(0.05 * matrix.numpy()), rtol=1e-5, atol=1e-7)


def test_an_implicit_method_warns_of_large_matrices(recwarn):
    solver = RungeKutta("trbdf2", num_steps=1)
    with pytest.warns(
        UserWarning, match=r"300 x 300 matrix for every sample(.|\n)*Received: a state of shape \[\(2, 300\)"
    ):
        keras_node.odeint(lambda y: -y, tf.ones((2, 300)), [0.0, 0.1], solver=solver)
    recwarn.clear()
    keras_node.odeint(lambda y: -y, tf.ones((300, 2)), [0.0, 0.1], solver=solver)
    keras_node.odeint(lambda y: -y, tf.ones(300), [0.0, 0.1])
    assert not recwarn


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"explicit method 'tsit5'(.|\n)*newton_tolerance"):
        RungeKutta("tsit5", newton_tolerance=0.1)
    with pytest.raises(ValueError, match=r"last axis(.|\n)*atol=\(0.1, 0.2\)"):
        keras_node.odeint(lambda y: -y, tf.ones((2, 3)), [0.0, 1.0], solver=RungeKutta(atol=[0.1, 0.2]))
    with pytest.raises(ValueError, match="`rtol` must be positive"):
        RungeKutta(rtol=[1e-3, 0.0])
    with pytest.raises(ValueError, match=r"norm=.full"):
        keras_node.odeint(
            lambda y: -y,
            tf.ones((2, 2)),
            [0.0, 1.0],
            solver=RungeKutta(atol=[0.1, 0.2]),
            gradient=keras_node.BacksolveAdjoint(norm="full"),
        )
    unknown = tf.function(lambda y: keras_node.odeint(lambda y: -y, y, [0.0, 1.0], solver="trbdf2").ys)
    with pytest.raises(ValueError, match="sizes of the state"):
        unknown.get_concrete_function(tf.TensorSpec((None, None)))


@pytest.mark.parametrize("method", ["tsit5", "kvaerno3"])
def test_each_entry_of_the_state_has_its_own_tolerance(method):
    def field(t, y):
        return tf.stack([-y[0], 1e-6 * tf.cos(20 * t)])

    y0 = tf.constant([1.0, 0.0], tf.float64)
    errors = []
    for atol in (1e-6, [1e-6, 1e-12]):
        solver = RungeKutta(method, rtol=1e-6, atol=atol)
        y1 = tf.function(lambda: keras_node.odeint(field, y0, [0.0, 2.0], solver=solver).ys[-1])()  # noqa: B023
        errors.append(abs(float(y1[1]) - 5e-8 * np.sin(40)))
    assert errors[1] < 1e-11 and errors[1] < errors[0] / 10
    again = RungeKutta.from_config(solver.get_config())
    assert again == solver and hash(again) == hash(solver) and again.atol == (1e-6, 1e-12)


# Layers, files and the inverse


def test_a_layer_trains_saves_and_counts(tmp_path):
    solver = RungeKutta("esdirk43", rtol=1e-3, atol=[1e-4, 1e-4, 1e-6])
    layer = keras_node.ODELayer(keras.layers.Dense(3), solver=solver, track_stats=True, name="ode")
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    history = model.fit(x, x[:, :1] ** 2, 8, epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["ode_factorizations"][-1] >= history["ode_steps"][-1] > 0
    assert history["ode_iterations"][-1] > history["ode_steps"][-1]
    assert history["ode_backward_factorizations"][-1] > history["ode_backward_steps"][-1]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)
    assert again.get_layer("ode").solver == solver
    assert again.get_layer("ode").get_config()["gradient"] is None


@pytest.mark.parametrize("case", ["rnn", "cde", "flow"])
def test_every_layer_that_solves_takes_an_implicit_method(case):
    rng = np.random.default_rng(0)
    x, times = rng.normal(size=(3, 4, 2)).astype("float32"), np.cumsum(rng.uniform(size=(3, 4)), 1).astype("float32")
    results = []
    for solver in ("trbdf2", "bosh3"):
        solver = RungeKutta(solver, rtol=1e-4, atol=1e-5)
        keras.utils.set_random_seed(0)
        if case == "rnn":
            layer = keras_node.ODERNN(keras.layers.GRUCell(2), keras.layers.Dense(2), solver=solver)
            arguments = (x, times)
        elif case == "cde":
            layer, arguments = keras_node.NeuralCDE(2, keras.layers.Dense(2 * 3), solver=solver), (x, times)
        else:
            layer, arguments = keras_node.ContinuousFlow(2, solver=solver), (x[:, 0],)

        def gradients(*arguments, layer=layer):
            with tf.GradientTape() as tape:
                y = layer(*arguments, training=False)
                value = tf.reduce_sum(y**2)
            return y, tape.gradient(value, layer.trainable_variables)

        layer.build(*(a.shape for a in arguments[:1]))
        results.append((tf.function(gradients) if solver.tableau.implicit else gradients)(*arguments))
    tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=3e-3), *results)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_inverse(jit_compile):
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(6, 5, 5))
    matrices[0] = np.eye(5)[[3, 1, 0, 4, 2]]  # needs pivots
    matrices[1, 2] = 0  # singular
    matrices[2, 0, 0] = np.nan
    matrices[3] *= 1e-30
    result = tf.function(inverse, jit_compile=jit_compile)(tf.constant(matrices)).numpy()
    assert not np.isfinite(result[1]).all() and not np.isfinite(result[2]).all()
    for i in (0, 3, 4, 5):
        np.testing.assert_allclose(result[i], np.linalg.inv(matrices[i]), rtol=1e-9)
    assert tf.function(inverse)(tf.zeros((0, 3, 3))).shape == (0, 3, 3)


def test_a_tableau_of_an_implicit_method_checks_itself():
    tableau = TABLEAUS["esdirk43"]
    for change in (
        {"gamma": tableau.gamma + 1e-9},
        {"b_error": (*tableau.b_error[:-1], tableau.b_error[-1] + 1e-9)},
        {"order": 5},
    ):
        with pytest.raises(ValueError, match="esdirk43"):
            dataclasses.replace(tableau, **change)


@pytest.mark.parametrize("method", IMPLICIT)
def test_the_stability_function_vanishes_at_infinity(method):
    tableau = TABLEAUS[method]
    a, b = tableau.matrix, np.array(tableau.b)
    null = np.array([1, *np.linalg.solve(a[1:, 1:], -a[1:, 0])])
    z = -1e10
    stability = 1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * a, np.ones(len(b)))
    assert abs(stability) < 1e-5
    assert all(0 <= c <= 1 for c in tableau.c)
    # On the imaginary axis no frequency grows: A-stable.
    frequencies = 1j * np.logspace(-2, 4, 400)
    values = [abs(1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * a, np.ones(len(b)))) for z in frequencies]
    assert max(values) <= 1 + 1e-9
    # Dense output and guesses stay bounded.
    np.testing.assert_allclose(null @ np.array(tableau.b_dense), 0, atol=1e-12)
    for row in tableau.guesses[2:]:
        assert abs(np.dot(row, null[: len(row)])) < 1e-10


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_solve_without_steps_has_converged(per_sample):
    y0 = tf.constant([[1.0, 2.0]], tf.float64)
    solution = keras_node.odeint(lambda y: -y, y0, [0.5, 0.5], solver=RungeKutta("trbdf2", per_sample=per_sample))
    np.testing.assert_array_equal(solution.status, np.zeros(np.shape(solution.status)))
    np.testing.assert_array_equal(solution.ys[-1], y0)


@pytest.mark.parametrize(("per_sample", "own"), [(True, False), (False, True)])
def test_samples_of_one_number_have_their_gradient(per_sample, own):
    """A state of shape `(batch,)` has one Jacobian for each sample if each has its own steps or times."""
    y0, ends = tf.constant([1.0, 2.0, 3.0], tf.float64), np.array([0.5, 1.0, 2.0] if own else [1.0, 1.0, 1.0])
    ts = np.stack([np.zeros(3), ends]) if own else [0.0, 1.0]
    solver = RungeKutta("esdirk54", rtol=1e-9, atol=1e-9, per_sample=per_sample)

    @tf.function
    def gradient(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            total = tf.reduce_sum(keras_node.odeint(lambda y: -(y**2), y0, ts, solver=solver).ys[-1])
        return tape.gradient(total, y0)

    np.testing.assert_allclose(gradient(y0), 1 / (1 + y0 * ends) ** 2, rtol=1e-6)
