"""Second derivatives and forward mode: right, or refused."""

import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

TIGHT = {"rtol": 1e-7, "atol": 1e-7, "max_steps": 200}
SHARED = np.array([0.0, 0.4, 1.0])
OWN = np.array([[0.0, 0.2], [0.6, 0.1], [1.1, -0.3]])
MATRIX = tf.constant([[-0.1, 1.1], [-1.2, 0.2]], tf.float64)
Y0 = tf.constant([[1.0, 0.5], [0.3, -1.0]], tf.float64)


def solve(y0, matrix, ts, gradient, solver):
    field = lambda t, y, matrix: tf.tanh(y @ matrix) + 0.3 * tf.sin(2 * t) * y  # noqa: E731
    return keras_node.odeint(field, y0, ts, args=matrix, gradient=gradient, solver=solver).ys


def gradients_of(inputs, gradient, solver):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        ys = solve(*inputs, gradient, solver)
        value = tf.reduce_sum(tf.sin(ys) * tf.reshape(tf.range(1.0, 13.0, dtype=ys.dtype)[: tf.size(ys)], ys.shape))
    return tape.gradient(value, inputs)


def hessian_products(inputs, vectors, gradient, solver):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        gradients = gradients_of(inputs, gradient, solver)
        product = tf.add_n([tf.reduce_sum(g * v) for g, v in zip(gradients, vectors, strict=True)])
    return tape.gradient(product, inputs)


HESSIANS = {
    "two": (SHARED[[0, 2]], False, "eager"),
    "own": (OWN, False, "eager"),
    "reversed, per sample": (SHARED[::-1], True, "graph"),
    "three": (SHARED, False, "graph"),
    "three under XLA": (SHARED, False, "xla"),
}


# XLA does not differentiate a loop in a loop twice, which "direct" would need for three times. test_jit_compile.py has
# second derivatives with backsolve under XLA.
@pytest.mark.parametrize(
    ("gradient", "case"),
    [
        *((gradient, case) for gradient in GRADIENTS for case in ("two", "own")),
        ("backsolve", "reversed, per sample"),
        ("direct", "three"),
        ("checkpointed", "three under XLA"),
        ("reversible", "reversed, per sample"),
    ],
)
def test_hessian_vector_products_equal_finite_differences(gradient, case):
    ts, per_sample, mode = HESSIANS[case]
    # Those of the discrete solution are compared on few steps; the adjoint's, on next to the exact solution.
    solver = keras_node.RungeKutta("heun", num_steps=2, per_sample=per_sample)
    reference = "direct"
    if gradient == "backsolve":
        method = "dopri5" if mode == "eager" else "bosh3"  # the former takes fewer steps, the latter is traced sooner
        solver = keras_node.RungeKutta(method, per_sample=per_sample, **TIGHT)
    if gradient in ("backsolve", "reversible"):  # the discrete solution of the latter is another one
        reference = gradient
    inputs = [Y0, MATRIX, tf.constant(ts)]
    rng = np.random.default_rng(0)
    vectors = [tf.constant(rng.normal(size=x.shape)) for x in inputs]
    first = lambda *inputs: gradients_of(list(inputs), reference, solver)  # noqa: E731
    ends = [first(*(x + sign * 1e-5 * v for x, v in zip(inputs, vectors, strict=True))) for sign in (1, -1)]
    function = hessian_products if mode == "eager" else tf.function(hessian_products, jit_compile=mode == "xla")
    tolerance = 1e-4 if gradient == "backsolve" else 1e-7
    for computed, right, left in zip(function(inputs, vectors, gradient, solver), *ends, strict=True):
        np.testing.assert_allclose(computed, (right - left) / 2e-5, rtol=tolerance, atol=tolerance)


def test_samples_at_rest_between_two_times_and_between_all():
    """Right in one solve with a sample that moves; where no step is made, NaN rather than a number."""
    ts = tf.constant([[0.0, 0.2], [0.6, 0.2]], tf.float64)
    inputs = [Y0, MATRIX, ts]
    vectors = [tf.ones_like(Y0), tf.ones_like(MATRIX), tf.zeros_like(ts)]
    solver = keras_node.RungeKutta("bosh3", **TIGHT)
    products = {g: hessian_products(inputs, vectors, g, solver) for g in ("backsolve", "checkpointed")}
    for a, b in zip(products["backsolve"], products["checkpointed"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    inputs[2] = tf.constant([0.5, 0.5], tf.float64)
    vectors[2] = tf.zeros_like(inputs[2])
    assert np.isnan(hessian_products(inputs, vectors, "backsolve", solver)[2]).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_penalty_trains_weights(gradient):
    """The derivative of a squared input gradient with respect to a weight, in closed form: y(1) = exp(w) y(0)."""
    w = tf.constant(0.3, tf.float64)
    x = tf.constant([2.0, -1.0], tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            inner.watch(x)
            solver = keras_node.RungeKutta("dopri5", rtol=1e-9, atol=1e-9)
            y1 = keras_node.odeint(lambda t, y, w: w * y, x, [0.0, 1.0], args=w, gradient=gradient, solver=solver).ys[
                -1
            ]
        penalty = tf.reduce_sum(inner.gradient(y1, x) ** 2)
    np.testing.assert_allclose(penalty, 2 * np.exp(0.6), rtol=1e-6)
    np.testing.assert_allclose(outer.gradient(penalty, w), 4 * np.exp(0.6), rtol=1e-6)


def directional(y0, v, function, *args):
    with tf.autodiff.ForwardAccumulator(y0, v) as accumulator:
        ys = function(y0, *args)
    return accumulator.jvp(ys)


@pytest.mark.parametrize("ts", [SHARED[[0, 2]], SHARED], ids=["two", "three"])
@pytest.mark.parametrize("around", [False, True], ids=["eager", "around a tf.function"])
def test_forward_mode_through_direct(ts, around):
    solver = keras_node.RungeKutta("heun", num_steps=3)
    v = tf.constant([[0.3, -0.4], [1.0, 0.2]], tf.float64)
    function = lambda y0: solve(y0, MATRIX, tf.constant(ts), "direct", solver)  # noqa: E731
    expected = (function(Y0 + 1e-6 * v) - function(Y0 - 1e-6 * v)) / 2e-6
    computed = directional(Y0, v, tf.function(function) if around else function)
    np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-6)


def test_forward_mode_through_backsolve_around_a_function():
    solver = keras_node.RungeKutta("rk4", num_steps=10)
    function = lambda y0: solve(y0, MATRIX, tf.constant(SHARED), "backsolve", solver)  # noqa: E731
    expected = (function(Y0 * (1 + 1e-6)) - function(Y0 * (1 - 1e-6))) / 2e-6
    np.testing.assert_allclose(directional(Y0, Y0, tf.function(function)), expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_forward_mode_is_refused_where_it_would_be_wrong(gradient, mode):
    run = directional if mode == "eager" else tf.function(directional, jit_compile=mode == "xla")
    with pytest.raises(NotImplementedError, match='gradient="direct"'):
        run(Y0, Y0, solve, MATRIX, tf.constant(SHARED), gradient, keras_node.RungeKutta("rk4", num_steps=3))
