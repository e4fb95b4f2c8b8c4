"""Jumps and kinks: a step ends at each, and neither side of it sees the other."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

OWN = np.array([[0.0, 0.0, 1.5], [0.9, 2.0, 0.2]])


def switched(t, y, args):
    """Grows at one rate before t = 1 and falls at another from then on."""
    up, down = args[0], args[1]
    return tf.where(t < 1, up, down) * tf.ones_like(y)


def integral(t, up=3.0, down=-5.0):
    t = np.asarray(t)
    return up * np.minimum(t, 1) + down * np.maximum(t - 1, 0)


def solver_at(step_at=(1.0,), **options):
    return keras_node.RungeKutta("bosh3", rtol=1e-6, atol=1e-6, step_at=step_at, **options)


@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("ts", [[0.0, 2.0], [2.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.5, 1.5, 1.7]], ids=str)
def test_a_jump_costs_no_accuracy_and_no_steps(ts, mode):
    def solve(y0):
        return keras_node.odeint(switched, y0, ts, args=tf.constant([3.0, -5.0], tf.float64), solver=solver_at())

    run = solve if mode == "eager" else tf.function(solve, jit_compile=True)
    result = run(tf.zeros((2, 1), tf.float64))
    np.testing.assert_allclose(result.ys[:, 0, 0], integral(ts) - integral(ts[0]), atol=1e-12)
    assert int(result.stats.num_rejected) == 0
    blind = keras_node.odeint(
        switched,
        tf.zeros((2, 1), tf.float64),
        ts,
        args=tf.constant([3.0, -5.0], tf.float64),
        solver=keras_node.RungeKutta("tsit5", rtol=1e-6, atol=1e-6),
    )
    assert int(blind.stats.num_rejected) > 5
    assert np.max(np.abs(blind.ys[:, 0, 0] - (integral(ts) - integral(ts[0])))) > 1e-9


def test_after_a_stop_steps_are_as_long_as_before():
    def steps(step_at):
        solver = keras_node.RungeKutta("tsit5", rtol=1e-6, atol=1e-6, step_at=step_at, max_factor=2.0)
        return int(keras_node.odeint(lambda y: -y, tf.ones(2, tf.float64), [0.0, 10.0], solver=solver).stats.num_steps)

    assert max(steps([stop]) for stop in np.linspace(2, 4, 21)) <= steps([]) + 1


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_with_times_of_their_own(per_sample):
    ys = tf.function(
        lambda: (
            keras_node.odeint(
                switched,
                tf.zeros((3, 1), tf.float64),
                OWN,
                args=tf.constant([3.0, -5.0], tf.float64),
                solver=solver_at(per_sample=per_sample),
            ).ys
        )
    )()
    np.testing.assert_allclose(ys[1, :, 0], integral(OWN[1]) - integral(OWN[0]), atol=1e-12)


OUTSIDE = [-3.0, -1.0, 0.0, 1.0, 1.0, 2.0, 2.0, 7.0, 9.0]


def value_and_gradients(ts, args, solver, gradient):
    with tf.GradientTape() as tape:
        tape.watch([ts, args])
        y0 = tf.zeros((2, 1), args.dtype)
        solution = keras_node.odeint(switched, y0, ts, args=args, solver=solver, gradient=gradient, throw=False)
        value = tf.reduce_sum(solution.ys[-1])
    return solution, *tape.gradient(value, [ts, args])


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        ("backsolve", {"step_size": 0.3}),
        ("direct", {"step_size": 0.3}),
        ("checkpointed", {}),
        ("reversible", {}),
        ("backsolve", {"per_sample": True}),
        ("checkpointed", {"per_sample": True}),
    ],
    ids=str,
)
def test_times_outside_and_twice_do_no_harm(gradient, options):
    """A schedule of doses is mostly outside a given solve: as many evaluations and the gradients of the one inside."""
    method = "rk4" if "step_size" in options else "bosh3"
    solver, expected = (
        keras_node.RungeKutta(method, step_at=step_at, max_steps=100, **options) for step_at in (OUTSIDE, [1.0])
    )
    args = tf.constant([3.0, -5.0], tf.float64)
    # Where a time is a kink itself, its gradient is that of one side or the other.
    for ts in ([0.1, 1.0, 1.9], [1.9, 0.1], [0.1, 0.4, 0.4, 1.9]):
        ts = tf.constant(ts, tf.float64)
        solution, dts, dargs = value_and_gradients(ts, args, solver, gradient)
        assert int(np.max(solution.status)) == 0
        states = integral(ts) - integral(ts[0])
        np.testing.assert_allclose(solution.ys[:, 0, 0], states, atol=1e-12)
        before, after = np.minimum(ts, 1), np.maximum(ts - 1, 0)
        np.testing.assert_allclose(dargs, [2 * (x[-1] - x[0]) for x in (before, after)], atol=1e-9)
        rates = 2 * np.where(ts < 1, 3.0, -5.0)
        np.testing.assert_allclose([dts[0], dts[-1]], [-rates[0], rates[-1]], atol=1e-9)
        same, *_ = value_and_gradients(ts, args, expected, gradient)
        np.testing.assert_array_equal(solution.stats.num_evaluations, same.stats.num_evaluations)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_all_kinks_outside_cost_nothing_in_any_mode(gradient):
    args, calls = tf.constant([3.0, -5.0], tf.float64), []

    def counted(t, y, args):
        calls.append(t)
        return switched(t, y, args)

    def run(ts, solver):
        with tf.GradientTape() as tape:
            tape.watch(args)
            y0 = tf.zeros((2, 1), tf.float64)
            solution = keras_node.odeint(counted, y0, ts, args=args, solver=solver, gradient=gradient, throw=False)
            value = tf.reduce_sum(solution.ys[-1])
        number = len(calls)
        return solution, tape.gradient(value, args), number

    plain, outside = (
        keras_node.RungeKutta("bosh3", step_at=step_at, max_steps=40) for step_at in ((), [-2.0, -1.0, 2.0, 3.0, 4.0])
    )
    own = np.array([[0.1, 0.3], [0.6, 0.9]])
    for ts in ([0.1, 0.9], [0.9, 0.5, 0.1], own, tf.constant([0.1, 0.9], tf.float64)):
        counts = []
        for solver in (plain, outside):
            calls.clear()
            solution, dargs, forwards = run(ts, solver)
            counts.append((forwards, len(calls)))
            times = np.asarray(ts)
            np.testing.assert_allclose(
                dargs, [(2 if times.ndim == 1 else 1) * np.sum(times[-1] - times[0]), 0], atol=1e-9
            )
        assert counts[0] == counts[1]
    compiled = tf.function(lambda ts: run(ts, outside)[:2], jit_compile=gradient in ("backsolve", "reversible"))
    for ts in ([0.1, 0.9], [0.9, 0.1]):
        solution, dargs = compiled(tf.constant(ts, tf.float64))
        np.testing.assert_allclose(dargs, [2 * (ts[1] - ts[0]), 0], atol=1e-9)
        y0 = tf.zeros((2, 1), tf.float64)
        expected = keras_node.odeint(switched, y0, ts, args=args, solver=plain, gradient=gradient).stats
        assert int(solution.stats.num_evaluations) == int(expected.num_evaluations)


@pytest.mark.parametrize(
    ("ts", "per_sample"),
    [([0.0, 2.0], False), ([2.0, 0.5, 0.0], False), (OWN, False), ([0.0, 1.0, 2.0], True)],
    ids=str,
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_across_a_jump(gradient, ts, per_sample):
    args = tf.constant([3.0, -5.0], tf.float64)
    ts = tf.constant(ts, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch([args, ts])
        y0 = tf.zeros((3, 1), tf.float64)
        solver = solver_at(per_sample=per_sample)
        ys = keras_node.odeint(switched, y0, ts, args=args, gradient=gradient, solver=solver).ys
        value = tf.reduce_sum(ys[-1])
    dargs, dts = tape.gradient(value, [args, ts])
    before, behind = np.minimum(ts, 1), np.maximum(ts - 1, 0)
    samples = 1 if ts.shape.rank == 2 else 3
    np.testing.assert_allclose(dargs, [samples * np.sum(x[-1] - x[0]) for x in (before, behind)], atol=1e-6)
    rates = np.where(ts < 1, 3.0, -5.0)
    if not np.any(ts == 1):
        np.testing.assert_allclose(dts[-1], samples * rates[-1], atol=1e-6)
        np.testing.assert_allclose(dts[0], -samples * rates[0], atol=1e-6)


def test_it_is_saved_and_refused_where_it_has_no_effect():
    solver = solver_at([0.5, 1.0])
    assert keras_node.RungeKutta.from_config(solver.get_config()).step_at == (0.5, 1.0)
    assert "step_at=(0.5, 1.0)" in repr(solver)
    with pytest.raises(ValueError, match="no effect"):
        keras_node.RungeKutta("rk4", num_steps=3, step_at=[0.5])
    with pytest.raises(ValueError, match="finite"):
        keras_node.RungeKutta("tsit5", step_at=[np.nan])


@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float64, after inputs in float32"])
def test_a_field_sees_its_side_of_a_kink_in_its_own_precision(dtype, mode):
    """For a float32 layer the next float64 before 0.3 is 0.3 itself."""

    class Field(keras.layers.Layer):
        def call(self, t, y):
            before = keras.ops.cast(t < 0.3, y.dtype)
            return (8 * before - 5) * keras.ops.ones_like(y)

    field = Field(dtype=dtype.split(",")[0])
    if "inputs" in dtype:
        t, y = keras.Input((1,)), keras.Input((1,))
        field = keras.Model([t, y], field(t, y))

    def solve(ts, solver):
        run = lambda: keras_node.odeint(field, tf.zeros((2, 1), tf.float64), ts, solver=solver).ys[:, 0, 0]  # noqa: E731
        return (run if mode == "eager" else tf.function(run, jit_compile=True))()

    ys = solve([0.0, 0.5, 1.0], keras_node.RungeKutta("rk4", step_size=0.07, step_at=[0.3, 2.0]))
    np.testing.assert_allclose(ys, [0.0, 0.9 - 1.0, 0.9 - 3.5], atol=1e-7)
    ys = solve([1.0, 0.0], keras_node.RungeKutta("tsit5", step_at=[0.3]))
    np.testing.assert_allclose(ys, [0.0, 3.5 - 0.9], atol=1e-7)
