"""The numbers that `odeint` gives: accuracy, order, dense output, direction of time, failure."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import solve_ivp

import keras_node
import problems
from keras_node.solvers.tableaus import TABLEAUS

embedded = [name for name, tableau in TABLEAUS.items() if tableau.embedded]


def in_mode(mode, function):
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "xla")


def pendulum(t, y):
    return tf.stack([y[..., 1], -tf.sin(y[..., 0]) + 0.1 * tf.cos(t)], axis=-1)


def decay(t, y):
    """Non-autonomous, with a closed form."""
    return -2.0 * t * y


def decay_solution(t, y0=1.0, t0=0.0):
    return y0 * np.exp(t0**2 - np.asarray(t) ** 2)


# The same of implicit methods is in test_stiff.py, of symplectic ones in test_symplectic.py.
@pytest.mark.parametrize("method", [name for name, t in TABLEAUS.items() if not (t.implicit or t.symplectic)])
def test_the_error_falls_with_the_order_of_the_method(method):
    order = TABLEAUS[method].order
    counts = [4, 6, 8, 12] if order >= 8 else [16, 24, 32]
    ts = np.linspace(0, problems.DRIVEN.t1, 3)
    errors = []
    for count in counts:
        solver = keras_node.RungeKutta(method, num_steps=count)
        ys = keras_node.odeint(problems.DRIVEN.field, tf.constant(problems.DRIVEN.y0), ts, solver=solver).ys
        errors.append(np.max(np.abs(ys - problems.DRIVEN.solution(ts))))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.3


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@pytest.mark.parametrize("problem", problems.PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("method", embedded)
def test_adaptive_steps_keep_the_error_near_the_tolerance(method, problem, rtol):
    if method == "heun" and rtol < 1e-3:
        rtol = 1e-5
    solver = keras_node.RungeKutta(method, rtol=rtol, atol=rtol, max_steps=100_000)
    ts = np.linspace(0.0, problem.t1, 21)
    solve = tf.function(lambda: keras_node.odeint(problem.field, tf.constant(problem.y0), ts, solver=solver))
    error = np.abs(solve().ys - problem.solution(ts))
    # A step of trbdf2 may have all of the error that is allowed, and there are thousands of them. Between its steps,
    # esdirk43 is of order 3 only.
    assert 0 < error.max() < {"trbdf2": 100, "esdirk43": 30}.get(method, 10) * rtol


@pytest.mark.parametrize("method", [method for method in embedded if not TABLEAUS[method].a_dense])
def test_more_times_cost_no_more_evaluations(method):
    solver = keras_node.RungeKutta(method, rtol=1e-4)
    y0 = tf.constant([0.5, 1.0], tf.float64)
    few = keras_node.odeint(pendulum, y0, [0.0, 2.0], solver=solver)
    many = keras_node.odeint(pendulum, y0, np.linspace(0, 2, 50), solver=solver)
    assert int(few.stats.num_evaluations) == int(many.stats.num_evaluations)
    np.testing.assert_array_equal(few.ys[-1], many.ys[-1])


def test_evaluations_are_counted():
    calls = []

    def field(y):
        calls.append(1)
        return -y

    solver = keras_node.RungeKutta("dopri5", rtol=1e-6)
    stats = keras_node.odeint(field, tf.constant([1.0]), [0.0, 3.0], solver=solver, gradient="direct").stats
    assert int(stats.num_evaluations) == len(calls) - 1  # the first call learns which variables the field reads
    assert int(stats.num_evaluations) == 2 + 6 * int(stats.num_steps + stats.num_rejected)


def lotka_volterra(t, y):
    return tf.stack([1.5 * y[0] - y[0] * y[1], y[0] * y[1] - 3 * y[1]])


def test_the_dense_output_of_dopri8_is_as_exact_as_its_steps():
    ts = np.linspace(0, 10, 41)
    solver = keras_node.RungeKutta("dopri8", rtol=1e-10, atol=1e-10)
    y0 = tf.constant([1.0, 1.0], tf.float64)
    solve = tf.function(lambda ts: keras_node.odeint(lotka_volterra, y0, ts, solver=solver).ys)
    between = solve(tf.constant(ts))
    # Here every time is the end of a solve, and so of a step.
    at_ends = [solve(tf.constant([0, t]))[-1] for t in ts[5::5]]
    exact = solve_ivp(
        lambda t, y: lotka_volterra(t, tf.constant(y)).numpy(), (0, 10), [1, 1], "DOP853", ts, rtol=1e-13, atol=1e-14
    ).y.T
    error = np.abs(between - exact).max(axis=1)
    assert error.max() < 1.5e-9  # the error of DOP853 of SciPy at this tolerance
    np.testing.assert_array_less(error[5::5], 2 * np.abs(at_ends - exact[5::5]).max(axis=1))


def test_further_stages_are_evaluated_only_where_a_time_falls_into_a_step():
    calls = []

    def field(t, y):
        calls.append(1)
        return lotka_volterra(t, y)

    solver = keras_node.RungeKutta("dopri8", rtol=1e-8)
    evaluations = []
    for ts in ([0.0, 10.0], [0.0, 5.0, 10.0], [0.0, 5.0, 5.0001, 5.0002, 10.0]):
        calls.clear()
        stats = keras_node.odeint(field, tf.ones(2, tf.float64), ts, solver=solver, gradient="direct").stats
        assert stats.num_evaluations == len(calls) - 1
        evaluations.append(int(stats.num_evaluations))
    # One of these steps ends at the last time, and one contains all others.
    assert np.diff(evaluations).tolist() == [10, 0]


def test_further_stages_of_samples_are_counted_for_each():
    ts = tf.constant([[0.0, 0.0], [2.0, 3.99], [6.0, 4.0]], tf.float64)
    ends = tf.stack([ts[0], ts[2]])
    counts = {}
    for per_sample in (True, False):
        solver = keras_node.RungeKutta("dopri8", per_sample=per_sample)
        y0 = tf.ones((2, 1), tf.float64)
        two, three = (keras_node.odeint(lambda y: -y, y0, t, solver=solver) for t in (ends, ts))
        counts[per_sample] = (three.stats.num_evaluations - two.stats.num_evaluations).numpy()
        np.testing.assert_allclose(three.ys[1:, :, 0], np.exp(-ts[1:]), atol=1e-3)
    # Both times of the second sample lie in its last step.
    assert counts[True].tolist() == [10, 5]
    assert counts[False] == 10


def test_scipy_agrees():
    ts = np.linspace(0, 6, 13)
    reference = solve_ivp(
        lambda t, y: pendulum(tf.constant(t, tf.float64), tf.constant(y)).numpy(),
        (0, 6),
        [0.5, 1.0],
        t_eval=ts,
        rtol=1e-10,
        atol=1e-10,
    )
    solver = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-10)
    solution = tf.function(
        lambda: keras_node.odeint(pendulum, tf.constant([0.5, 1.0], tf.float64), ts, solver=solver)
    )()
    np.testing.assert_allclose(solution.ys, reference.y.T, atol=2e-9)


def test_tensorflow_probability_agrees():
    import tensorflow_probability as tfp

    y0 = tf.constant([0.5, 1.0], tf.float64)
    theirs = tfp.math.ode.DormandPrince(rtol=1e-10, atol=1e-10).solve(pendulum, 0.0, y0, [1.0, 3.0]).states
    solver = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-10)
    ours = keras_node.odeint(pendulum, y0, [0.0, 1.0, 3.0], solver=solver).ys[1:]
    np.testing.assert_allclose(ours, theirs, atol=2e-7)  # theirs is 8e-8 off SciPy's at 1e-12


def test_eager_graph_and_xla_agree():
    def solve(y0):
        solver = keras_node.RungeKutta("tsit5", rtol=1e-7)
        return keras_node.odeint(pendulum, y0, np.linspace(0, 4, 9), solver=solver).ys

    y0 = tf.constant([[0.5, 1.0], [2.0, 0.0]], tf.float64)
    eager = solve(y0)
    np.testing.assert_allclose(in_mode("graph", solve)(y0), eager, rtol=1e-12)
    np.testing.assert_allclose(in_mode("xla", solve)(y0), eager, rtol=1e-10)


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_time_runs_backwards(method):
    solver = keras_node.RungeKutta(method, **({"num_steps": 50} if method == "rk4" else {"rtol": 1e-8}))
    ts = [1.5, 1.0, 0.25]
    solution = keras_node.odeint(decay, tf.constant([1.0], tf.float64), ts, solver=solver)
    np.testing.assert_allclose(solution.ys[:, 0], decay_solution(np.array(ts), 1.0, 1.5), rtol=1e-6)


def test_repeated_times_give_the_same_state():
    ys = keras_node.odeint(lambda y: -y, tf.constant([1.0, 2.0]), [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]).ys
    for first, second in ((0, 1), (2, 3), (4, 5)):
        np.testing.assert_array_equal(ys[first], ys[second])
    still = keras_node.odeint(lambda y: -y, tf.constant([1.0, 2.0]), [1.0, 1.0, 1.0]).ys
    np.testing.assert_array_equal(still, np.tile([1.0, 2.0], (3, 1)))


def test_the_state_may_be_a_nest():
    y0 = {"position": tf.ones((3, 2)), "moment": (tf.zeros((3, 2)),)}
    solution = keras_node.odeint(
        lambda y: {"position": y["moment"][0], "moment": (-y["position"],)}, y0, [0.0, 1.0, 2.0], solver="dopri5"
    )
    np.testing.assert_allclose(solution.ys["position"][:, 0, 0], np.cos([0, 1, 2]), atol=1e-2)
    assert solution.ys["moment"][0].shape == (3, 3, 2)


def test_constant_steps_of_a_given_size_end_on_the_last_time():
    solver = keras_node.RungeKutta("rk4", step_size=0.3)
    solution = keras_node.odeint(decay, tf.constant([1.0], tf.float64), [0.0, 0.5, 1.0], solver=solver)
    assert int(solution.stats.num_steps) == 4
    np.testing.assert_allclose(solution.ys[:, 0], decay_solution([0.0, 0.5, 1.0]), atol=2e-3)


@pytest.mark.parametrize("own_times", [False, True])
def test_per_sample_steps_equal_solving_each_sample_alone(own_times):
    rates = tf.constant([[1.0], [5.0], [25.0]], tf.float64)
    y0 = tf.ones((3, 1), tf.float64)
    ts = np.array([[0.0, 0.0, 0.0], [0.5, 1.0, 0.2], [2.0, 1.5, 1.0]]) if own_times else np.array([0.0, 0.7, 2.0])

    def field(t, y, rates):
        return -rates * (y - tf.cos(t))

    together = tf.function(
        lambda: keras_node.odeint(field, y0, ts, args=rates, solver=keras_node.RungeKutta("tsit5", per_sample=True))
    )()
    for i in range(3):
        alone = keras_node.odeint(field, y0[i : i + 1], ts[:, i] if own_times else ts, args=rates[i : i + 1])
        np.testing.assert_allclose(together.ys[:, i], alone.ys[:, 0], rtol=1e-10)
        assert int(together.stats.num_steps[i]) == int(alone.stats.num_steps)
        assert int(together.stats.num_evaluations[i]) == int(alone.stats.num_evaluations)


def test_samples_may_have_times_of_their_own_in_one_solve():
    ts = np.array([[0.0, 1.0, 0.5], [0.4, 0.5, 0.5], [1.5, 0.0, 0.5]])
    y0 = tf.ones((3, 2), tf.float64)
    ys = keras_node.odeint(decay, y0, ts, solver=keras_node.RungeKutta("tsit5", rtol=1e-8, atol=1e-8)).ys
    np.testing.assert_allclose(ys[..., 0], decay_solution(ts, 1.0, ts[0]), rtol=1e-6)
    np.testing.assert_array_equal(ys[:, 2], np.ones((3, 2)))  # no time passes: unchanged


@pytest.mark.parametrize(
    ("mode", "gradient", "ts"),
    [
        ("eager", "backsolve", [0.0, 1.0]),
        ("graph", "backsolve", [0.0, 0.4, 1.0]),
        ("graph", "checkpointed", [0.0, 0.4, 1.0]),
        ("xla", "backsolve", [1.0, 0.4, 0.0]),
    ],
)
def test_samples_at_rest_change_nothing_for_the_others(mode, gradient, ts):
    """With one error norm for the batch, as by default: a sample at rest has no error, and padding is at rest."""

    def field(t, y, rate):
        return rate * y * tf.cos(rate * t)

    @functools.partial(in_mode, mode)
    def solve(y0, ts, rate):
        with tf.GradientTape() as tape:
            tape.watch((y0, rate))
            solution = keras_node.odeint(field, y0, ts, args=rate, gradient=gradient)
            value = tf.reduce_sum(solution.ys[:, :2] ** 2)
        return solution.ys[:, :2], solution.stats, tape.gradient(value, (y0, rate))

    number, rate = 40, tf.constant(20.0, tf.float64)
    y0 = tf.constant([[1.0], [0.5], *[[3.0]] * number], tf.float64)
    # The times of the second sample are half as far apart, and those of the padding are all the same.
    moving = np.stack([ts, np.multiply(ts, 0.5)], axis=1)
    resting = np.full((len(ts), number), 0.7)
    ys, stats, (by_state, by_rate) = solve(y0[:2], moving, rate)
    padded_ys, padded_stats, (padded_by_state, padded_by_rate) = solve(y0, np.hstack([moving, resting]), rate)
    assert int(padded_stats.num_steps) == int(stats.num_steps) > 10
    np.testing.assert_allclose(padded_ys, ys, rtol=1e-12)
    np.testing.assert_allclose(padded_by_state[:2], by_state, rtol=1e-10)
    np.testing.assert_allclose(padded_by_rate, by_rate, rtol=1e-10)


@pytest.mark.parametrize("ends", [(0.1, 0.3), (0.2, 0.6), (0.4, 0.7), (0.5, 1.7)])
def test_a_sample_at_rest_until_the_end_of_constant_steps_keeps_its_state(ends):
    first, last = ends  # (last + first) - first is more than last
    ts = np.array([[0.0, 0.0], [first, first], [last, first]])
    solver = keras_node.RungeKutta("rk4", num_steps=1)
    ys = keras_node.odeint(decay, tf.ones((2, 1), tf.float64), ts, solver=solver).ys
    np.testing.assert_array_equal(ys[2, 1], ys[1, 1])


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_field_of_nan_ends_with_status_2(mode):
    def solve(y0):
        return keras_node.odeint(lambda y: y * np.nan, y0, [0.0, 0.5, 1.0], throw=False)

    solution = in_mode(mode, solve)(tf.constant([1.0]))
    assert int(solution.status) == keras_node.Status.NON_FINITE
    assert np.isnan(solution.ys[1:]).all() and float(solution.ys[0, 0]) == 1.0


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_too_many_steps_end_with_status_1_and_keep_what_was_reached(mode):
    solver = keras_node.RungeKutta("tsit5", rtol=1e-6, max_steps=8)

    def solve(y0):
        return keras_node.odeint(pendulum, y0, [0.0, 0.1, 100.0], solver=solver, throw=False)

    solution = in_mode(mode, solve)(tf.constant([0.5, 1.0]))
    assert int(solution.status) == keras_node.Status.MAX_STEPS
    assert np.isfinite(solution.ys[1]).all() and np.isnan(solution.ys[2]).all()


def test_a_solution_that_blows_up_ends():
    solve = tf.function(lambda y0: keras_node.odeint(lambda y: y**2, y0, [0.0, 2.0], throw=False))
    solution = solve(tf.constant([1.0]))
    assert int(solution.status) != 0 and np.isnan(solution.ys[-1]).all()


def test_a_failure_raises_eagerly_and_in_a_graph():
    def solve(y0):
        return keras_node.odeint(lambda y: y * np.nan, y0, [0.0, 1.0]).ys

    for mode in ("eager", "graph"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Status 2"):
            in_mode(mode, solve)(tf.constant([1.0]))


def test_times_that_turn_back_unseen_give_nan_for_their_sample():
    solve = tf.function(
        lambda ts: keras_node.odeint(lambda y: -y, tf.ones((2, 1)), ts, throw=False),
        input_signature=[tf.TensorSpec((3, 2))],
    )
    solution = solve(tf.constant([[0.0, 0.0], [1.0, 1.0], [0.5, 2.0]]))
    assert int(solution.status) == keras_node.Status.BAD_TIMES
    assert np.isnan(solution.ys[1:, 0]).all() and np.isfinite(solution.ys[:, 1]).all()


def test_half_precision_is_integrated_in_float32():
    y0 = tf.ones((2,), tf.float16)
    dtypes = []
    solution = keras_node.odeint(lambda y: dtypes.append(y.dtype) or -y, y0, [0.0, 1.0])
    assert set(dtypes) == {tf.float32} and solution.ys.dtype == tf.float16
