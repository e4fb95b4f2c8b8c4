"""Fields that do what TensorFlow and Keras allow: lookups, cached graphs, recomputation, metrics, mapped solves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

SOLVER = keras_node.RungeKutta("rk4", num_steps=8)
modes = pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
gradients = pytest.mark.parametrize("gradient", GRADIENTS)


def in_mode(mode, function, *arguments):
    return (function if mode == "eager" else tf.function(function, jit_compile=mode == "xla"))(*arguments)


@modes
@gradients
def test_a_lookup_among_the_arguments(gradient, mode):
    def slope(rates):
        with tf.GradientTape() as tape:
            tape.watch(rates)
            field = lambda t, y, rates: -tf.gather(rates, 1) * y  # noqa: E731
            y = keras_node.odeint(field, tf.ones(1), [0.0, 1.0], args=rates, gradient=gradient, solver=SOLVER).ys[-1]
        return tf.convert_to_tensor(tape.gradient(y, rates))

    np.testing.assert_allclose(in_mode(mode, slope, tf.constant([0.5, 1.0])), [0, -np.exp(-1)], rtol=1e-3)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_embedding_in_a_field_is_trained(jit_compile):
    """One step of gradient descent for the rates of four categories, `loss = mean(exp(rate[category]))`."""

    class Field(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.rates = keras.layers.Embedding(4, 1, embeddings_initializer="zeros")

        def call(self, t, y, args):
            return self.rates(args) * y

    layer = keras_node.ODELayer(Field(), solver=SOLVER)
    y0, category = keras.Input((1,)), keras.Input((), dtype="int32")
    model = keras.Model([y0, category], layer(y0, args=category))
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: p, jit_compile=jit_compile)
    model.fit([np.ones((4, 1)), np.array([0, 1, 1, 3])], np.zeros((4, 1)), batch_size=4, verbose=0)
    np.testing.assert_allclose(layer.get_weights()[0][:, 0], [-0.25, -0.5, 0, -0.25], rtol=1e-3)


class Traced(keras.layers.Layer):
    """A layer whose `call` is traced once and for all."""

    def build(self, shape):
        self.w = self.add_weight(shape=(), initializer="ones")

    @tf.function
    def call(self, y):
        return -self.w * y


@gradients
@pytest.mark.parametrize("kind", ["layer", "callable"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_tf_function_reads_the_weights_of_today(mode, kind, gradient):
    if kind == "layer":
        field = Traced()
        field.build((1,))
        w = field.w
    else:
        w = keras.Variable(1.0)
        field = tf.function(lambda t, y: -w * y)

    def run():
        with tf.GradientTape() as tape:
            y = keras_node.odeint(field, tf.ones((1,)), [0.0, 1.0], gradient=gradient, solver=SOLVER).ys[-1]
        return y, tape.gradient(y, w.value)

    run = run if mode == "eager" else tf.function(run)
    for value in (1.0, 2.0):
        w.assign(value)
        y, slope = run()
        np.testing.assert_allclose([y[0], slope], [np.exp(-value), -np.exp(-value)], rtol=1e-2)


def test_a_tf_function_that_was_traced_without_weights_is_refused():
    """Plain Keras says "No gradients provided for any variable"."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = keras_node.ODELayer(Traced(), solver=SOLVER)

        def call(self, x):
            return self.layer(x)

    model = Model()
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match="traced before the layer's weights had values"):
        model.fit(np.ones((4, 1)), np.zeros((4, 1)), verbose=0)


@gradients
@pytest.mark.parametrize(("by", "mode"), [("scope", "graph"), ("recompute_grad", "eager")])
def test_a_field_that_is_computed_again_for_its_gradient(by, mode, gradient):
    if (gradient, mode) == ("direct", "graph"):
        pytest.skip("TensorFlow cannot differentiate a loop with `tf.recompute_grad` in it, and says so")
    y0 = tf.constant([[1.0, 2.0], [0.5, -1.0]])

    def slopes(again):
        keras.utils.set_random_seed(0)
        if again and by == "scope":
            with keras.RematScope(mode="full"):
                dense = keras.layers.Dense(2, "tanh")
        else:
            dense = keras.layers.Dense(2, "tanh")
        dense.build((None, 2))
        field = tf.recompute_grad(lambda y: dense(y)) if again and by == "recompute_grad" else dense

        def run():
            with tf.GradientTape() as tape:
                ys = keras_node.odeint(lambda y: field(y), y0, [0.0, 1.0], gradient=gradient, solver=SOLVER).ys
                value = tf.reduce_sum(ys[-1] ** 2)
            return tape.gradient(value, [w.value for w in dense.trainable_variables])

        return run() if mode == "eager" else tf.function(run)()

    for one, other in zip(slopes(False), slopes(True), strict=True):
        assert np.max(np.abs(one)) > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("jit_compile", [False, True])
@gradients
def test_a_mapped_solve_has_its_gradient_or_nan(gradient, jit_compile):
    """`tf.vectorized_map` drops custom gradients; it must not make zeros of them."""
    if gradient == "direct" and jit_compile:
        return  # is refused
    y0, rate = tf.ones((3, 1)), tf.constant(1.0)
    options = {"gradient": gradient, "solver": SOLVER, "jit_compile": jit_compile}

    def solve(y):
        return keras_node.odeint(lambda t, y, rate: -rate * y, y, [0.0, 1.0], args=rate, **options).ys[-1]

    with tf.GradientTape() as tape:
        tape.watch([y0, rate])
        ys = tf.vectorized_map(solve, y0)
    dy0, drate = tape.gradient(ys, [y0, rate])
    if gradient == "direct":
        np.testing.assert_allclose(dy0, np.full((3, 1), np.exp(-1)), rtol=1e-3)
        np.testing.assert_allclose(drate, -3 * np.exp(-1), rtol=1e-3)
    else:
        assert np.all(np.isnan(dy0)) and np.isnan(drate)
    np.testing.assert_allclose(ys, np.full((3, 1), np.exp(-1)), rtol=1e-3)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_jacobian_by_tensorflow(mode):
    matrix = tf.constant([[0.0, 1.0], [-1.0, -0.5]])

    def jacobian():
        y0 = tf.constant([1.0, 2.0])
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(y0)
            y1 = keras_node.odeint(lambda y: tf.linalg.matvec(matrix, y), y0, [0.0, 1.0]).ys[-1]
        return tape.jacobian(y1, y0, experimental_use_pfor=mode == "graph")

    np.testing.assert_allclose(in_mode(mode, jacobian), tf.linalg.expm(matrix), atol=5e-3)


def test_a_metric_or_a_counter_in_a_field_is_refused():
    class Field(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.speed = keras.metrics.Mean(name="speed")

        def call(self, y):
            self.speed.update_state(tf.reduce_mean(y))
            return -y

    with pytest.raises(ValueError, match="Update a metric outside the field"):
        keras_node.ODELayer(Field())(tf.ones((4, 3)), training=True)

    class Counting(keras.layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight((), "zeros", "int32", trainable=False, name="calls")

        def call(self, y):
            self.calls.assign_add(1)
            return -y

    with pytest.raises(ValueError, match=r"cannot update a state during a solve, but it updates '.*/calls'"):
        keras_node.ODELayer(Counting())(tf.ones((4, 3)), training=True)
    inner = keras_node.ODELayer(keras.layers.Dense(3), track_stats=True)
    with pytest.raises(ValueError, match="leave out its `track_stats`"):
        keras_node.ODELayer(inner)(tf.ones((4, 3)), training=True)


@gradients
@pytest.mark.parametrize(("state", "weights", "mode"), [("float64", "float32", "xla"), ("float32", "float64", "eager")])
def test_mixtures_of_precision(state, weights, gradient, mode):
    """`dy/dt = -a tanh(w y)`, beside the same in float64 throughout."""
    y0 = np.random.default_rng(0).normal(size=(4, 2))

    def slopes(state, weights, gradient, mode):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(2, "tanh", kernel_initializer=keras.initializers.Constant(0.7), dtype=weights)
        dense.build((None, 2))
        start, args = tf.constant(y0, state), tf.constant(-0.5, weights)

        def run(start, args):
            with tf.GradientTape() as tape:
                tape.watch([start, args])
                field = lambda t, y, a: tf.cast(a, y.dtype) * tf.cast(dense(y), y.dtype)  # noqa: E731
                ys = keras_node.odeint(field, start, [0.0, 1.0], args=args, solver=SOLVER, gradient=gradient).ys
                value = tf.reduce_sum(ys[-1] ** 2)
            return tape.gradient(value, [start, args, *(w.value for w in dense.trainable_variables)])

        return in_mode(mode, run, start, args)

    expected = slopes("float64", "float64", "direct", "eager")
    results = slopes(state, weights, gradient, mode)
    assert [r.dtype.name for r in results] == [state, *[weights] * 3]
    tolerance = 1e-5 if gradient != "backsolve" else 1e-3  # the adjoint of four steps is another approximation
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=tolerance, atol=tolerance)


def test_what_makes_variables_in_the_first_trace():
    x = tf.constant([[1.0, 2.0]])

    def field():
        dense = keras.layers.Dense(2, kernel_initializer="identity")
        return lambda y: dense(y)

    def event():
        dense = keras.layers.Dense(1, kernel_initializer="ones", bias_initializer=keras.initializers.Constant(-6.0))
        return keras_node.Event(lambda y: dense(y))

    plain, grown = field(), np.exp(1) * x
    solved = tf.function(lambda x: keras_node.odeint(plain, x, [0.0, 1.0], solver=SOLVER).ys[-1])(x)
    np.testing.assert_allclose(solved, grown, rtol=1e-4)
    layer = keras_node.ODELayer(field(), solver=SOLVER)
    np.testing.assert_allclose(tf.function(lambda x: layer(x))(x), grown, rtol=1e-4)
    six = event()
    stopped = tf.function(lambda x: keras_node.odeint(lambda y: y, x, [0.0, 1.0], solver=SOLVER, event=six).ys[-1])(x)
    np.testing.assert_allclose(stopped, [[2.0, 4.0]], rtol=1e-4)


@pytest.mark.parametrize("gradient", [name for name in GRADIENTS if name != "direct"])
def test_a_simulator_whose_derivative_has_no_static_shape(gradient):
    @tf.custom_gradient
    def simulator(y, k):
        def derivative(upstream):
            compute = lambda y, k, u: [-k * u, -np.sum(y * u, axis=0)]  # noqa: E731
            return tf.numpy_function(compute, [y, k, upstream], [tf.float32, tf.float32])

        return tf.numpy_function(lambda y, k: -k * y, [y, k], tf.float32), derivative

    k = tf.constant([0.5, 1.0, 2.0])

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch((x, k))
            field = lambda t, y, k: tf.ensure_shape(simulator(y, k), y.shape)  # noqa: E731
            y = keras_node.odeint(field, x, [0.0, 1.0], args=k, solver=SOLVER, gradient=gradient).ys[-1]
        return tape.gradient(y, (x, k))

    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "float32")
    by_x, by_k = run(tf.constant(x))
    np.testing.assert_allclose(by_x, np.exp(-k) * np.ones_like(x), rtol=1e-3)
    np.testing.assert_allclose(by_k, -np.sum(x, axis=0) * np.exp(-k), rtol=1e-3)
