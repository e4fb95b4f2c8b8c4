"""What layers in a field take from Keras' call context they have in the gradient too, though the call has ended."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

SOLVER = keras_node.RungeKutta("rk4", num_steps=6)
X = tf.constant(np.random.default_rng(0).normal(size=(4, 3)), tf.float32)


class Noisy:
    """A network with dropout, and what a loss of its solution gives for one and the same noise."""

    def __init__(self):
        keras.utils.set_random_seed(1)
        self.dense = keras.layers.Dense(16, "tanh")
        self.dropout = keras.layers.Dropout(0.5, seed=3)
        self.net = keras.Sequential([self.dense, self.dropout, keras.layers.Dense(3)])
        self.net.build((None, 3))

    def loss_and_gradient(self, call, mode):
        """Returns a function of no arguments."""

        def run():
            self.dropout.seed_generator.state.assign([1, 2])
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(call(X) ** 2)
            return loss, tape.gradient(loss, self.dense.kernel.value)

        return run if mode == "eager" else tf.function(run, jit_compile=mode == "xla")

    def slope_by_differences(self, loss_and_gradient, direction, epsilon=1e-2):
        kernel = self.dense.kernel
        ends = []
        for sign in (1, -1):
            kernel.assign_add(sign * epsilon * direction)
            ends.append(loss_and_gradient()[0])
            kernel.assign_sub(sign * epsilon * direction)
        return float(ends[0] - ends[1]) / (2 * epsilon)


class ByOdeint(keras.Model):
    """The idiom of Keras: layers get `training` by themselves."""

    def __init__(self, net, gradient):
        super().__init__()
        self.net, self.gradient = net, gradient

    def call(self, x):
        return keras_node.odeint(self.net, x, [0.0, 1.0], solver=SOLVER, gradient=self.gradient).ys[-1]


def by_odeint(noisy, gradient):
    model = ByOdeint(noisy.net, gradient)
    return lambda x: model(x, training=True)


def by_layer(noisy, gradient):
    layer = keras_node.ODELayer(lambda y: noisy.net(y), solver=SOLVER, gradient=gradient)
    return lambda x: layer(x, training=True)


def by_argument(noisy, gradient):
    def call(x):
        solution = keras_node.odeint(
            lambda y: noisy.net(y), x, [0.0, 1.0], solver=SOLVER, gradient=gradient, training=True
        )
        return solution.ys[-1]

    return call


def by_series(noisy, gradient):
    cell = keras.layers.SimpleRNNCell(3, seed=1)
    layer = keras_node.ODERNN(cell, lambda h: noisy.net(h), solver=SOLVER, gradient=gradient)
    times = np.cumsum(np.full((4, 2), 0.5, "float32"), axis=1)
    return lambda x: layer(tf.stack([x, x], axis=1), times, training=True)


@pytest.mark.parametrize(
    ("make", "mode", "gradient"),
    [
        (by_odeint, "eager", "backsolve"),
        (by_odeint, "graph", "checkpointed"),
        (by_layer, "graph", "backsolve"),
        (by_layer, "xla", "checkpointed"),
        (by_argument, "eager", "checkpointed"),
        (by_argument, "xla", "backsolve"),
        (by_series, "eager", "checkpointed"),
        (by_series, "graph", "backsolve"),
    ],
)
def test_the_noise_of_training_is_that_of_the_gradient(make, mode, gradient):
    noisy = Noisy()
    loss_and_gradient = noisy.loss_and_gradient(make(noisy, gradient), mode)
    _, slope = loss_and_gradient()
    direction = np.random.default_rng(2).normal(size=slope.shape).astype("float32")
    expected = noisy.slope_by_differences(loss_and_gradient, direction)
    assert abs(expected) > 0.1
    np.testing.assert_allclose(np.sum(slope * direction), expected, rtol=1e-2)


def test_a_field_draws_noise_in_training_only():
    noisy = Noisy()
    model = ByOdeint(noisy.net, "backsolve")
    still = keras_node.odeint(noisy.net, X, [0.0, 1.0], solver=SOLVER).ys[-1]
    np.testing.assert_array_equal(model(X, training=False), still)
    np.testing.assert_array_equal(model(X), still)
    assert np.max(np.abs(model(X, training=True) - still)) > 0.1


def test_the_gradient_converts_a_field_as_little_as_the_solve_does():
    """AutoGraph makes `float` another function, in eager mode too, where the gradient of times maps over them."""
    seen, ts = set(), tf.constant([0.0, 0.5, 1.0])

    def noting(t, y):
        seen.add(type(float(t)))
        return -y

    for gradient in GRADIENTS:
        with tf.GradientTape() as tape:
            tape.watch(ts)
            value = tf.reduce_sum(keras_node.odeint(noting, X, ts, gradient=gradient, solver=SOLVER).ys)
        assert tape.gradient(value, ts) is not None
    assert seen == {float}


def test_a_call_with_training_says_nothing_to_later_layers():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.seen = []

        def call(self, x):
            keras_node.odeint(lambda y: -y, x, [0.0, 1.0], training=True)
            return keras.layers.Dropout(0.5)(x)

    np.testing.assert_array_equal(Model()(X, training=False), X)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_a_variable_keeps_the_precision_in_which_the_layer_reads_it(gradient, mode):
    """In half precision 1.0004 is 1, also where the gradient evaluates `dy/dt = -w**2 * y`."""

    dtypes = []

    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(), initializer=keras.initializers.Constant(1.0004))

        def call(self, x):
            def field(y):
                dtypes.append(tf.as_dtype(self.w.value.dtype))
                return -(keras.ops.cast(self.w, "float32") ** 2) * y

            x = keras.ops.cast(x, "float32")
            return keras_node.odeint(field, x, [0.0, 1.0], solver="rk4", gradient=gradient).ys[-1]

    layer = Layer(dtype="mixed_float16")
    layer.build((4, 3))
    dtypes.clear()

    def run():
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(layer(tf.ones((4, 3))))
        return tape.gradient(value, layer.w.value)

    slope = run() if mode == "eager" else tf.function(run)()
    assert set(dtypes) == {tf.float16}
    np.testing.assert_allclose(slope, -2 * 12 * np.exp(-1), rtol=2e-3)


@pytest.mark.parametrize(
    ("gradient", "jit_compile"), [("backsolve", True), ("checkpointed", False), ("backsolve", "auto")]
)
def test_second_derivatives_are_of_the_same_noise(gradient, jit_compile):
    noisy = Noisy()
    solver = keras_node.RungeKutta("midpoint", num_steps=20)

    @tf.function
    def run(x):
        noisy.dropout.seed_generator.state.assign([1, 2])
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                options = {"solver": solver, "gradient": gradient, "training": True, "jit_compile": jit_compile}
                value = tf.reduce_sum(keras_node.odeint(noisy.net, x, [0.0, 1.0], **options).ys[-1] ** 2)
            slope = tape.gradient(value, x)
        return slope, outer.gradient(slope, x)

    epsilon = 1e-2
    expected = (run(X + epsilon)[0] - run(X - epsilon)[0]) / (2 * epsilon)
    second = run(X)[1]
    np.testing.assert_allclose(second, expected, atol=5e-3 * np.max(np.abs(expected)))


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "reversible"])
def test_a_stateless_call_has_the_gradients_of_its_values(gradient):
    layer = keras_node.ODELayer(keras.layers.Dense(3), solver=SOLVER, gradient=gradient)
    layer.build((None, 3))
    values = [tf.identity(v.value) for v in layer.trainable_variables]

    def run():
        with tf.GradientTape() as tape:
            tape.watch(values)
            y, _ = layer.stateless_call(values, [], X, training=True)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, values)

    for eager, graph in zip(run(), tf.function(run)(), strict=True):
        np.testing.assert_allclose(eager, graph, rtol=1e-4)
        assert np.all(np.isfinite(eager))
