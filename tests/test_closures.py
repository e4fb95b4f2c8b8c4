"""A field that closes over what a gradient is wanted for: the right gradient, or NaN where nothing can find it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

Y0 = tf.ones((2, 3))
RATE = tf.Variable(2.0)
KERAS_RATE = keras.Variable(2.0)
SLOPE = -6 * np.exp(-2)  # of the sum of exp(-rate) over six elements


class Closed(keras.layers.Layer):
    """A layer that reads an attribute which is not one of its weights."""

    rate = None

    def call(self, y):
        return -self.rate * y


def last_state(field, gradient):
    return tf.reduce_sum(keras_node.odeint(field, Y0, [0.0, 1.0], gradient=gradient, solver="rk4").ys[-1])


def over_a_tensor(gradient):
    with tf.GradientTape() as tape:
        rate = 1.0 * RATE
        value = last_state(lambda y: -rate * y, gradient)
    return tape.gradient(value, RATE)


def over_a_tensor_in_a_layer(gradient):
    layer = Closed()
    with tf.GradientTape() as tape:
        layer.rate = 1.0 * RATE
        value = last_state(layer, gradient)
    return tape.gradient(value, RATE)


def over_a_variable(gradient):
    with tf.GradientTape() as tape:
        value = last_state(lambda y: -RATE * y, gradient)
    return tape.gradient(value, RATE)


def over_a_keras_variable(gradient):
    with tf.GradientTape() as tape:
        value = last_state(lambda y: -KERAS_RATE * y, gradient)
    return tape.gradient(value, KERAS_RATE.value)


def in_mode(mode, case, gradient):
    return case(gradient) if mode == "eager" else tf.function(case, jit_compile=mode == "xla")(gradient)


modes = pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
cases = pytest.mark.parametrize("case", [over_a_tensor, over_a_tensor_in_a_layer, over_a_variable])


adjoints = pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])


@modes
@cases
@adjoints
def test_the_gradient_of_what_a_field_closes_over(gradient, case, mode):
    result = in_mode(mode, case, gradient)
    if mode == "eager" and case is not over_a_variable:
        assert np.isnan(result)  # an eager tensor leaves no trace
    else:
        np.testing.assert_allclose(result, SLOPE, rtol=1e-3)


@modes
@cases
def test_direct_sees_what_a_field_closes_over(case, mode):
    np.testing.assert_allclose(in_mode(mode, case, "direct"), SLOPE, rtol=1e-3)


@modes
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "direct"])
def test_keras_variables_are_seen(gradient, mode):
    np.testing.assert_allclose(in_mode(mode, over_a_keras_variable, gradient), SLOPE, rtol=1e-3)


@modes
def test_a_field_over_its_own_initial_state(mode):
    """`dy/dt = y0 - y` from `2 * y0`: y(1) = y0 * (1 + exp(-1))."""

    def case(gradient):
        with tf.GradientTape() as tape:
            tape.watch(Y0)
            value = tf.reduce_sum(keras_node.odeint(lambda y: Y0 - y, 2 * Y0, [0.0, 1.0], gradient=gradient).ys[-1])
        return tape.gradient(value, Y0)

    def in_graph(gradient):
        def of(y0):
            with tf.GradientTape() as tape:
                tape.watch(y0)
                value = tf.reduce_sum(keras_node.odeint(lambda y: y0 - y, 2 * y0, [0.0, 1.0], gradient=gradient).ys[-1])
            return tape.gradient(value, y0)

        return tf.function(of, jit_compile=mode == "xla")(Y0)

    if mode == "eager":
        assert np.all(np.isnan(case("backsolve")))
    else:
        np.testing.assert_allclose(in_graph("backsolve"), np.full((2, 3), 1 + np.exp(-1)), rtol=1e-3)


@modes
@adjoints
def test_what_nobody_asks_for_does_no_harm(gradient, mode):
    """A tape watches all that the field closes over, and the gradient of something else is asked for."""
    constant = tf.constant([0.25, 0.5, 0.75])

    def case(gradient):
        with tf.GradientTape() as tape:
            tape.watch(Y0)
            shift = 0.0 * KERAS_RATE
            value = last_state(lambda y: -RATE * y * constant + shift, gradient)
        return tape.gradient(value, Y0)

    expected = np.tile(np.exp([-0.5, -1.0, -1.5]), (2, 1))
    np.testing.assert_allclose(in_mode(mode, case, gradient), expected, rtol=1e-3)


@adjoints
def test_a_variable_that_is_read_later_than_at_the_start(gradient):
    """Eagerly a field may look at the time. Half of the way is at each rate."""
    early, late = tf.Variable(1.0), keras.Variable(2.0)
    solver = keras_node.RungeKutta("rk4", step_size=0.125, step_at=[0.5])
    with tf.GradientTape() as tape:

        def field(t, y):
            return -early * y if t < 0.5 else -late * y

        value = keras_node.odeint(field, tf.ones(1), [0.0, 1.0], solver=solver, gradient=gradient).ys[-1]
    expected = -0.5 * np.exp(-1.5)
    np.testing.assert_allclose(tape.gradient(value, [early, late.value]), [expected, expected], rtol=1e-3)


@adjoints
def test_second_derivatives_of_what_a_field_closes_over(gradient):
    rate = tf.Variable(0.7, dtype=tf.float64)

    @tf.function
    def run(scale):
        with tf.GradientTape() as outer:
            outer.watch(scale)
            with tf.GradientTape() as tape:
                tape.watch(scale)
                factor = scale**2
                y = keras_node.odeint(
                    lambda y: -rate * factor * y,
                    tf.ones(1, tf.float64),
                    [0.0, 1.0],
                    solver=keras_node.RungeKutta("tsit5", rtol=1e-9, atol=1e-9),
                    gradient=gradient,
                ).ys[-1]
            first = tape.gradient(y, [scale, rate])
        return first, outer.gradient(first[0], [scale, rate])

    s, r = 1.2, 0.7
    y = np.exp(-r * s**2)
    first, second = run(tf.constant(s, tf.float64))
    np.testing.assert_allclose(first, [-2 * r * s * y, -(s**2) * y], rtol=1e-6)
    np.testing.assert_allclose(second, [(-2 * r + 4 * r**2 * s**2) * y, (-2 * s + 2 * r * s**3) * y], rtol=1e-6)


def test_a_compiled_solve_with_a_closure_says_what_to_do():
    @tf.function
    def run():
        with tf.GradientTape() as tape:
            y = keras_node.odeint(lambda y: -RATE * y, tf.ones(1), [0.0, 1.0], solver="rk4", jit_compile=True).ys[-1]
        return tape.gradient(y, RATE)

    with pytest.raises(ValueError, match="pass tensors through `args`"):
        run()


def test_a_tape_around_a_function():
    @tf.function
    def function(rate):
        return last_state(lambda y: -rate * y, "backsolve")

    with tf.GradientTape() as tape:
        value = function(1.0 * RATE)
    np.testing.assert_allclose(tape.gradient(value, RATE), SLOPE, rtol=1e-3)


class Features(keras.Model):
    """Features computed by one part of a model, closed over by the field of another."""

    def __init__(self, gradient, through_args):
        super().__init__()
        self.encoder, self.net = keras.layers.Dense(3), keras.layers.Dense(3, "tanh")
        self.gradient, self.through_args = gradient, through_args

    def build(self, shape):
        self.encoder.build(shape)
        self.net.build(shape)

    def call(self, x):
        h = self.encoder(x)
        options = {"gradient": self.gradient, "solver": keras_node.RungeKutta("rk4", num_steps=4)}
        if self.through_args:
            return keras_node.odeint(lambda t, y, h: self.net(y) + h, h, [0.0, 1.0], args=h, **options).ys[-1]
        return keras_node.odeint(lambda y: self.net(y) + h, h, [0.0, 1.0], **options).ys[-1]


@pytest.mark.parametrize(("gradient", "jit_compile"), [("backsolve", True), ("checkpointed", False)])
def test_in_fit_it_is_as_if_passed_through_args(gradient, jit_compile):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    weights = []
    for through_args in (True, False):
        keras.utils.set_random_seed(0)
        model = Features(gradient, through_args)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        model.fit(x, x, epochs=2, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_in_fit_features_may_be_frozen():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    model = Features("backsolve", through_args=False)
    model.encoder.trainable = False
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.build((None, 3))
    frozen, trained = model.encoder.get_weights(), model.net.get_weights()
    model.fit(x, x, verbose=0)
    for layer, before, moves in ((model.encoder, frozen, False), (model.net, trained, True)):
        for one, other in zip(layer.get_weights(), before, strict=True):
            assert np.array_equal(one, other) != moves


def test_in_a_functional_model():
    rate = keras.Variable(1.0)
    x = keras.Input((3,))
    model = keras.Model(x, keras_node.ODELayer(lambda y: -rate * y)(x))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(model(Y0))
    np.testing.assert_allclose(tape.gradient(value, rate.value), -6 * np.exp(-1), rtol=1e-2)
    closed = keras.Model(x, keras_node.ODELayer(lambda y: -RATE * y)(x))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(closed(Y0))
    np.testing.assert_allclose(tape.gradient(value, RATE), SLOPE, rtol=1e-2)


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "direct"])
def test_a_frozen_weight_does_not_stand_in_the_way_of_others(gradient):
    class Field(keras.layers.Layer):
        def build(self, shape):
            self.one, self.other = (self.add_weight(shape=(), initializer="ones") for _ in range(2))

        def call(self, y):
            return -self.one * self.other * y

    field = Field()
    field.build((2, 3))
    field.one.trainable = False
    with tf.GradientTape() as tape:
        value = last_state(field, gradient)
    np.testing.assert_allclose(tape.gradient(value, field.other.value), -6 * np.exp(-1), rtol=1e-3)
