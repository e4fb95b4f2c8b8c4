"""Problems that are unstable backwards in time, where the plain adjoint fails, and what helps."""

import numpy as np
import pytest
import tensorflow as tf

import keras_node


def van_der_pol(t, y, mu):
    return tf.stack([y[..., 1], mu * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], axis=-1)


def stiff(t, y, rate):
    return -rate * (y - tf.cos(t))


PROBLEMS = {
    "stiff": (stiff, [[2.0]], [0.0, 20.0], 50.0),
    "van_der_pol": (van_der_pol, [[2.0, 0.0]], [0.0, 12.0], 5.0),
}


def gradients_of(name, gradient, solver, ts=None):
    field, y0, times, parameter = PROBLEMS[name]
    inputs = [tf.constant(y0, tf.float64), tf.constant(parameter, tf.float64)]

    @tf.function
    def compute(y0, parameter):
        with tf.GradientTape() as tape:
            tape.watch([y0, parameter])
            solution = keras_node.odeint(
                field, y0, times if ts is None else ts, args=parameter, gradient=gradient, solver=solver, throw=False
            )
            value = tf.reduce_sum(solution.ys[-1] * tf.constant([1.0, 0.3], y0.dtype)[: y0.shape[-1]])
        return tape.gradient(value, [y0, parameter])

    return [x.numpy() for x in compute(*inputs)]


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    exact = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-10, max_steps=100_000)
    return request.param, gradients_of(request.param, "direct", exact)


SOLVER = keras_node.RungeKutta("dopri5", rtol=1e-6, atol=1e-6)


def test_the_plain_adjoint_fails(problem):
    name, exact = problem
    with np.errstate(invalid="ignore"):
        assert not np.allclose(gradients_of(name, "backsolve", SOLVER)[1], exact[1], rtol=1)


@pytest.mark.parametrize(
    "gradient",
    [keras_node.BacksolveAdjoint(num_checkpoints=20), keras_node.CheckpointedAdjoint()],
    ids=["num_checkpoints", "checkpointed"],
)
def test_the_remedies_succeed(problem, gradient):
    name, exact = problem
    for computed, expected in zip(gradients_of(name, gradient, SOLVER), exact, strict=True):
        np.testing.assert_allclose(computed, expected, rtol=5e-3, atol=1e-12)


@pytest.mark.parametrize(
    ("ts", "per_sample"),
    [([0.0, 1.0], False), ([1.0, 0.3, 0.3, 0.1], True), ([[0.0, 1.0], [0.5, 0.2]], False)],
    ids=str,
)
def test_states_to_start_again_from_change_nothing_else(ts, per_sample):
    """Against the plain adjoint, at tolerances so tight that both are exact; `ts` and its states stay what they are."""
    solver = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-10, per_sample=per_sample)
    results = []
    for gradient in ("backsolve", keras_node.BacksolveAdjoint(num_checkpoints=3)):
        y0, times = tf.constant([[1.0, 0.5], [-0.3, 0.2]], tf.float64), tf.constant(ts, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch([y0, times])
            solution = tf.function(
                lambda y0, times, gradient=gradient: keras_node.odeint(
                    lambda t, y: tf.sin(3 * t) * tf.reverse(y, [-1]), y0, times, gradient=gradient, solver=solver
                )
            )(y0, times)
            value = tf.reduce_sum(solution.ys**2 * tf.reshape(tf.range(1.0, 5.0, dtype=y0.dtype), (2, 2)))
        results.append([solution.ys, *tape.gradient(value, [y0, times])])
    assert results[0][0].shape == (len(ts), 2, 2)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_counted_steps_have_no_states_in_between():
    with pytest.raises(ValueError, match="num_checkpoints=3, solver=RungeKutta"):
        keras_node.odeint(
            lambda y: -y,
            tf.ones((2,)),
            [0.0, 1.0],
            solver="rk4",
            gradient=keras_node.BacksolveAdjoint(num_checkpoints=3),
        )
