"""What the adjoint method has of its own: how its backward solve begins, where it begins again, and its norms."""

import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import BacksolveAdjoint, RungeKutta
from keras_node.gradients import GRADIENTS
from keras_node.gradients.record import LastSteps
from keras_node.interpolation import Progress

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
MATRIX = tf.constant([[-0.1, 1.1], [-1.2, 0.2]], tf.float64)
Y0 = tf.constant([[1.0, 0.5], [0.3, -1.0]], tf.float64)


def field(t, y, matrix):
    return tf.tanh(y @ matrix) + 0.3 * tf.sin(2 * t) * y


def gradients_of(sources, ts, gradient, **options):
    with tf.GradientTape() as tape:
        tape.watch(sources)
        ys = keras_node.odeint(field, Y0, ts, args=MATRIX, gradient=gradient, **options).ys
        weights = tf.reshape(tf.range(1, tf.size(ys) + 1), ys.shape)
        value = tf.reduce_sum(tf.sin(ys) * tf.cast(weights, ys.dtype))
    return tape.gradient(value, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def times_of_the_backward_solve(gradient, ts):
    """The times at which the backward solve evaluates the field."""
    seen = []

    def noting(t, y):
        seen.append(float(t))
        return -y * tf.cos(t)

    with tf.GradientTape() as tape:
        tape.watch(Y0)
        last = keras_node.odeint(noting, Y0, ts, gradient=gradient, solver=RungeKutta("tsit5", **TIGHT)).ys[-1]
    seen.clear()
    tape.gradient(last, Y0)
    return seen


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_state_begins_again_at_evenly_spaced_checkpoints(as_tensor):
    ts = tf.constant([1.0, 2.0, 9.0], tf.float64) if as_tensor else [1.0, 2.0, 9.0]
    assert {3.0, 5.0, 7.0} <= set(times_of_the_backward_solve(BacksolveAdjoint(num_checkpoints=3), ts))
    assert not {3.0, 5.0, 7.0} & set(times_of_the_backward_solve(BacksolveAdjoint(), ts))


def test_the_backward_solve_begins_with_the_step_that_the_forward_solve_reached():
    """A step of tsit5 takes six new evaluations after the first one; to estimate a first step takes one more."""
    assert len(times_of_the_backward_solve(BacksolveAdjoint(), [0.0, 4.0])) % 6 == 1
    own = BacksolveAdjoint(RungeKutta("tsit5", **TIGHT))
    assert len(times_of_the_backward_solve(own, [0.0, 4.0])) % 6 == 2


def test_the_last_two_accepted_steps_are_kept():
    observer = LastSteps(tf.zeros(()))
    memory = observer.start(Y0)
    for start, end, accepted in [(0.0, 0.5, True), (0.5, 2.5, False), (0.5, 0.75, True), (0.75, 1.75, False)]:
        progress = Progress(0, tf.constant(start), tf.constant(end), tf.constant(accepted))
        memory = observer.update(memory, None, progress)
    assert [float(length) for length in memory] == [0.25, 0.5]


@pytest.mark.parametrize("norm", ["state", "full"])
def test_both_norms_hold_at_the_times_in_between(norm):
    solver = RungeKutta("dopri5", **TIGHT)
    computed = gradients_of([Y0, MATRIX], [0.0, 0.7, 2.0], BacksolveAdjoint(norm=norm), solver=solver)
    for a, b in zip(computed, gradients_of([Y0, MATRIX], [0.0, 0.7, 2.0], "direct", solver=solver), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("ts", [[0.2, 0.2, 0.7, 0.7, 1.0, 1.0], [0.2, 0.2, 0.7], [0.2, 0.2, 0.2]], ids=len)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_times_that_are_numbers_may_coincide(gradient, ts):
    """The loss counts all states at one time, whether or not it is known before the solve that they are at one."""
    solver = RungeKutta("dopri5", **TIGHT)
    expected = gradients_of([Y0, MATRIX], tf.constant(ts, tf.float64), "direct", solver=solver)
    computed = gradients_of([Y0, MATRIX], ts, gradient, solver=solver)
    for a, b in zip(computed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_second_derivative_of_times_that_coincide_is_nan(per_sample):
    """There is no step between these times, so how the adjoint changes if one of them moves is not known."""
    ts = tf.constant([0.0, 0.4, 0.4, 1.0], tf.float64)
    gradient = BacksolveAdjoint(RungeKutta("dopri5", per_sample=per_sample, rtol=1e-6, atol=1e-6))

    def size(ts):
        (by_start,) = gradients_of([Y0], ts, gradient, solver=RungeKutta("dopri5", **TIGHT))
        return tf.reduce_sum(by_start**2)

    with tf.GradientTape() as tape:
        tape.watch(ts)
        value = size(ts)
    computed = tape.gradient(value, ts)
    step = tf.constant([1e-4, 0, 0, 0], tf.float64)
    np.testing.assert_allclose(computed[0], (size(ts + step) - size(ts - step)) / 2e-4, rtol=1e-4)
    np.testing.assert_array_equal(np.isnan(computed), [False, True, True, False])


def test_a_failure_is_excused_if_any_number_of_the_loss_is_not_finite():
    """Then the loss is to blame, and a loss scaler skips the step. Otherwise the error says what to do."""
    gradient, y0 = BacksolveAdjoint(RungeKutta("tsit5", max_steps=2)), (Y0, Y0)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(y0)
        ys = keras_node.odeint(
            lambda t, y: (tf.sin(9 * t) * y[0], -y[1]), y0, [0.0, 5.0], gradient=gradient, solver=RungeKutta(rtol=1e-2)
        ).ys
    ones = [tf.ones_like(y) for y in ys]
    with pytest.raises(tf.errors.InvalidArgumentError, match="The solve of the adjoint failed with status 1"):
        tape.gradient(ys, y0, output_gradients=ones)
    ones[1] = tf.tensor_scatter_nd_update(ones[1], [[1, 0, 1]], [np.inf])
    assert np.isnan(tape.gradient(ys, y0, output_gradients=ones)[0]).any()
