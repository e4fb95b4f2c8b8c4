"""A field that closes over what a gradient is wanted for: the right gradient, or an error with the way out."""

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
    """A layer that reads an attribute which is no weight."""

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


@modes
@cases
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_a_gradient_that_would_be_missing_is_refused(gradient, case, mode):
    with pytest.raises(ValueError, match="pass it through `args`"):
        in_mode(mode, case, gradient)


@modes
@cases
def test_direct_sees_what_a_field_closes_over(case, mode):
    np.testing.assert_allclose(in_mode(mode, case, "direct"), SLOPE, rtol=1e-3)


@modes
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "direct"])
def test_keras_variables_are_seen(gradient, mode):
    np.testing.assert_allclose(in_mode(mode, over_a_keras_variable, gradient), SLOPE, rtol=1e-3)


@modes
def test_a_field_over_its_own_initial_state_is_refused(mode):
    def case(gradient):
        with tf.GradientTape() as tape:
            tape.watch(Y0)
            value = last_state(lambda y: Y0 - y, gradient)
        return tape.gradient(value, Y0)

    with pytest.raises(ValueError, match="pass it through `args`"):
        in_mode(mode, case, "backsolve")


@modes
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_constants_and_variables_that_nobody_asks_for_do_no_harm(gradient, mode):
    constant = tf.constant([1.0, 2.0, 3.0])

    def case(gradient):
        return last_state(lambda y: -RATE * y * constant, gradient)

    np.testing.assert_allclose(in_mode(mode, case, gradient), 2 * np.sum(np.exp([-2.0, -4.0, -6.0])), rtol=1e-3)


def test_a_tape_around_a_function_is_no_way_round():
    @tf.function
    def function(rate):
        return last_state(lambda y: -rate * y, "backsolve")

    with pytest.raises(ValueError, match="pass it through `args`"), tf.GradientTape() as tape:
        tape.gradient(function(1.0 * RATE), RATE)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_fit(jit_compile):
    """Features computed by one part of a model, closed over by the field of another."""

    class Model(keras.Model):
        def __init__(self, through_args):
            super().__init__()
            self.encoder = keras.layers.Dense(3)
            self.through_args = through_args

        def call(self, x):
            h = self.encoder(x)
            if self.through_args:
                return keras_node.odeint(lambda t, y, h: h - y, 0 * h, [0.0, 1.0], args=h).ys[-1]
            return keras_node.odeint(lambda y: h - y, 0 * h, [0.0, 1.0]).ys[-1]

    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    for through_args in (True, False):
        model = Model(through_args)
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)
        if through_args:
            losses = model.fit(x, x, epochs=5, verbose=0).history["loss"]
            assert losses[-1] < 0.7 * losses[0]
        else:
            with pytest.raises(ValueError, match="pass it through `args`"):
                model.fit(x, x, verbose=0)


def test_in_a_functional_model():
    rate = keras.Variable(1.0)
    x = keras.Input((3,))
    model = keras.Model(x, keras_node.ODELayer(lambda y: -rate * y)(x))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(model(Y0))
    np.testing.assert_allclose(tape.gradient(value, rate.value), -6 * np.exp(-1), rtol=1e-2)
    closed = keras.Model(x, keras_node.ODELayer(lambda y: -RATE * y)(x))
    with pytest.raises(ValueError, match="pass it through `args`"), tf.GradientTape() as tape:
        tape.gradient(tf.reduce_sum(closed(Y0)), RATE)


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
