"""Jumps of the state at times that are known, such as doses."""

import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import Event

TIGHT = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-12, max_steps=256)
K = 0.7


def f64(x):
    return tf.constant(x, tf.float64)


def decay(t, y, args):
    return -args * y


def after_doses(y0, k, t, times, amounts):
    """The closed form of a decay with doses. A dose counts from just after its time on."""
    times = np.asarray(times)
    given = (times < t) & (times >= 0)
    return y0 * np.exp(-k * t) + np.sum(np.where(given, amounts * np.exp(-k * np.where(given, t - times, 0)), 0))


TS = [0.0, 0.5, 1.0, 2.5, 4.0]
# Unsorted, one before the start, one at the start, one at a time of the output, one at the end, one never.
TIMES = np.array([2.0, 1.0, -1.0, 0.0, 4.0, np.inf])
AMOUNTS = np.array([1.0, 0.5, 100.0, 0.25, 100.0, 100.0])


@pytest.mark.parametrize("per_sample", [False, True])
def test_doses_that_samples_share(per_sample):
    solver = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-12, per_sample=per_sample)
    y0 = f64([[2.0], [0.0]])
    solution = keras_node.odeint(decay, y0, TS, args=f64(K), jumps=(TIMES, f64(AMOUNTS[:, None])), solver=solver)
    expected = [[[after_doses(y, K, t, TIMES, AMOUNTS)] for y in (2.0, 0.0)] for t in TS]
    np.testing.assert_allclose(solution.ys, expected, rtol=1e-8)
    np.testing.assert_array_equal(solution.status, [0, 0])
    assert solution.events is None


def test_doses_of_every_sample_and_a_solve_backward_in_time():
    times = np.array([[0.5, np.nan], [2.0, 3.0]])
    amounts = f64([[[1.0], [9.0]], [[2.0], [3.0]]])
    solution = keras_node.odeint(
        decay, f64([[1.0], [1.0]]), [0.0, 4.0], args=f64(K), jumps=(times, amounts), solver=TIGHT
    )
    expected = [[after_doses(1.0, K, 4.0, [0.5, 2.0], [1.0, 2.0])], [after_doses(1.0, K, 4.0, [3.0], [3.0])]]
    np.testing.assert_allclose(solution.ys[-1], expected, rtol=1e-8)
    # Backward, the same jumps with the other sign lead back to the start.
    back = keras_node.odeint(decay, solution.ys[-1], [4.0, 0.0], args=f64(K), jumps=(times, -amounts), solver=TIGHT)
    np.testing.assert_allclose(back.ys[-1], [[1.0], [1.0]], rtol=1e-7)


@pytest.mark.parametrize(("gradient", "jit_compile"), [("backsolve", False), ("checkpointed", True), ("direct", False)])
def test_the_derivatives_of_doses(gradient, jit_compile):
    @tf.function(jit_compile=jit_compile)
    def run(y0, k, times, amounts):
        sources = (y0, k, times, amounts)
        with tf.GradientTape() as tape:
            tape.watch(sources)
            solution = keras_node.odeint(
                decay, y0, [0.0, 1.5, 4.0], args=k, jumps=(times, amounts), gradient=gradient, solver=TIGHT
            )
            total = tf.reduce_sum(solution.ys[1] + 2 * solution.ys[2])
        return total, tape.gradient(total, sources)

    times, amounts = np.array([3.0, 1.0, 7.0]), np.array([1.0, 0.5, 4.0])
    total, gradients = run(f64([[2.0]]), f64(K), f64(times), f64(amounts[:, None]))

    def value(y0, k, times, amounts):
        return after_doses(y0, k, 1.5, times, amounts) + 2 * after_doses(y0, k, 4.0, times, amounts)

    inputs = [np.array([2.0]), np.array([K]), times, amounts]
    np.testing.assert_allclose(total, value(*inputs), rtol=1e-9)
    for i, computed in enumerate(gradients):
        for j in range(inputs[i].size):
            eps = 1e-6 * np.eye(inputs[i].size)[j]
            more, less = ([x + s * eps if n == i else x for n, x in enumerate(inputs)] for s in (1, -1))
            expected = (value(*more) - value(*less)).item() / 2e-6
            np.testing.assert_allclose(np.ravel(computed)[j], expected, rtol=1e-6, atol=1e-8)


def test_doses_of_a_nested_state_until_an_event():
    # What is taken up accumulates; the event is a level of it, and a dose alone does not cross the surface.
    def field(t, y):
        return {"blood": -y["blood"], "taken": y["blood"]}

    y0 = {"blood": f64([[1.0], [0.2]]), "taken": f64([[0.0], [0.0]])}
    amounts = {"blood": f64([[1.0], [1.0]]), "taken": f64([[0.0], [0.0]])}
    event = Event(lambda t, y: y["taken"] - 1.45)
    solution = keras_node.odeint(
        field, y0, [0.0, 1.0, 3.0, 9.0], jumps=([1.0, 2.0], amounts), event=event, solver=TIGHT
    )
    # taken = y0 (1 - e^-t) + (1 - e^-(t-1)) + (1 - e^-(t-2)): solved for t after the second dose.
    decaying = np.array([1.0, 0.2]) + np.e + np.exp(2)
    expected = np.log(decaying / (np.array([1.0, 0.2]) + 2 - 1.45))
    assert expected[1] > 2
    between = np.log((1 + np.e) / 0.55)  # the first sample reaches the level before the second dose
    np.testing.assert_allclose(solution.events.ts[0], [between, expected[1]], rtol=1e-8)
    np.testing.assert_allclose(solution.ys["taken"][-1], [[1.45], [1.45]], rtol=1e-9)


def test_a_dose_can_carry_the_state_over_the_surface_of_an_event():
    # Jumping over a level is not an event. Coming back through it is.
    event = Event(lambda t, y: y - 2.0, reset=lambda t, y: 0.5 * y)
    solution = keras_node.odeint(
        lambda t, y: -y, f64([[1.0]]), [0.0, 4.0], jumps=([1.0], f64([[4.0]])), event=event, solver=TIGHT, max_events=3
    )
    start = np.exp(-1) + 4
    np.testing.assert_allclose(solution.events.ts[:, 0], [1 + np.log(start / 2), np.nan, np.nan], rtol=1e-9)
    np.testing.assert_allclose(solution.ys[-1, 0, 0], np.exp(-(4 - 1 - np.log(start / 2))), rtol=1e-8)


@pytest.mark.parametrize(
    ("jumps", "message"),
    [
        ([1.0, 2.0, 3.0], r"pair `\(times, amounts\)`"),
        (([[[1.0]]], [[1.0]]), r"of shape \(D,\) if all samples share them, or \(D, batch\)"),
        ((1.0, [[1.0]]), r"of shape \(D,\) if all samples share them"),
        (([[1.0, 2.0]], [[1.0]]), r"or \(D, batch\).*shape=\(1, 2\) for a batch of 1"),
        (([1.0], [[1.0], [2.0]]), r"one entry for each time.*shape \(2, 1\) for times of shape \(1,\)"),
        (([1.0, 2.0], [[1.0]]), r"one entry for each time.*shape \(1, 1\) for times of shape \(2,\)"),
        (([1.0], [[1.0, 2.0]]), r"the shape of the state.*a state of shape \(1, 1\)"),
        (([1.0], [[[1.0], [2.0]]]), r"the shape of the state.*shape \(1, 2, 1\)"),
        (([1.0], np.ones((1, 1, 1, 1))), r"\(D, \.\.\.\) if all samples share"),
        (([1.0], np.float64(1.0)), r"\(D, \.\.\.\) if all samples share"),
        (([1.0], {"dose": [[1.0]]}), "structure of the state. Received: amounts={'dose'"),
    ],
)
def test_an_error_says_what_jumps_must_be(jumps, message):
    with pytest.raises(ValueError, match=message):
        keras_node.odeint(lambda t, y: -y, f64([[1.0]]), [0.0, 4.0], jumps=jumps)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 2), (3, 2)])
def test_an_unknown_number_of_amounts_must_be_that_of_the_times(numbers):
    signature = [tf.TensorSpec([None], tf.float64), tf.TensorSpec([None, 1], tf.float64)]

    @tf.function(input_signature=signature)
    def run(times, amounts):
        return keras_node.odeint(lambda y: 0 * y, f64([[1.0]]), [0.0, 4.0], jumps=(times, amounts), solver="rk4").ys[-1]

    times, amounts = tf.range(1.0, 4.0, dtype=tf.float64), f64([[1.0], [10.0], [100.0]])
    np.testing.assert_allclose(run(times, amounts), [[112.0]])
    with pytest.raises(tf.errors.InvalidArgumentError, match="one amount for each time"):
        run(times[: numbers[0]], amounts[: numbers[1]])


def test_a_batch_axis_of_one_is_for_all_samples():
    for times, amounts in (([[1.0]], [[10.0]]), ([1.0], [[[10.0]]]), ([[1.0]], [[[10.0]]])):
        y0 = f64([[1.0], [2.0]])
        ys = keras_node.odeint(lambda y: 0 * y, y0, [0.0, 4.0], jumps=(times, f64(amounts)), solver="rk4").ys
        np.testing.assert_allclose(ys[-1], [[11.0], [12.0]])


def test_a_second_derivative_where_times_lie_on_both_sides_of_a_dose():
    """To the solve before the dose the later times are at its end, to the other one the earlier ones at its start."""
    y0, dose, ts = f64([[1.5]]), f64([0.5]), np.array([0.0, 0.2, 0.3, 0.8, 0.9, 1.0])
    with tf.GradientTape() as outer:
        outer.watch((y0, dose))
        with tf.GradientTape() as inner:
            inner.watch(y0)
            solver = keras_node.RungeKutta("dopri5", rtol=1e-9, atol=1e-9)
            ys = keras_node.odeint(
                lambda t, y: -y, y0, ts, jumps=(dose, f64([[1.0]])), gradient="backsolve", solver=solver
            ).ys
            value = tf.reduce_sum(ys**2)
        gradient = inner.gradient(value, y0)
    by_start, by_dose = outer.gradient(gradient, (y0, dose))
    np.testing.assert_allclose(by_start, [[2 * np.sum(np.exp(-2 * ts))]], rtol=1e-7)
    np.testing.assert_allclose(by_dose, [2 * np.sum(np.exp(0.5 - 2 * ts[ts > 0.5]))], rtol=1e-7)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_there_may_be_no_jumps(mode):
    y0 = tf.ones((2, 1))
    layer = keras_node.ODELayer(lambda y: -y, solver="rk4")

    def run():
        nothing = tf.zeros((0,)), tf.zeros((0, 1))
        solution = keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], jumps=nothing, solver="rk4")
        return solution.ys[-1], layer(y0, jumps=(np.zeros(0), np.zeros((0, 1))))

    for y1 in (run if mode == "eager" else tf.function(run))():
        np.testing.assert_allclose(y1, np.exp(-1) * np.ones((2, 1)), rtol=1e-5)
