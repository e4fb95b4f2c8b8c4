"""The Jacobian that a user gives to an implicit method: the same solution, in fewer operations."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import RungeKutta

Y0 = tf.constant([[1.0, 0.1, 0.2], [0.5, 0.3, 0.2]], tf.float64)
K = tf.constant([0.4, 300.0, 100.0], tf.float64)


def kinetics(t, y, k):
    a, b, c = tf.unstack(y, axis=-1)
    r = [k[0] * a, k[1] * b * b, k[2] * b * c]
    return tf.stack([-r[0] + r[2], r[0] - r[1] - r[2], r[1]], axis=-1)


def exact_jacobian(t, y, k):
    _, b, c = tf.unstack(y, axis=-1)
    zero = tf.zeros_like(b)
    fast = 2 * k[1] * b
    rows = [
        [zero - k[0], k[2] * c, k[2] * b],
        [zero + k[0], -fast - k[2] * c, -k[2] * b],
        [zero, fast, zero],
    ]
    return tf.stack([tf.stack(row, -1) for row in rows], -2)


def solve(jacobian, k=K, gradient=None, rtol=1e-9, method="esdirk43", **options):
    solver = RungeKutta(method, rtol=rtol, atol=1e-2 * rtol, max_newton_iterations=30, **options)
    return keras_node.odeint(kinetics, Y0, [0.0, 0.7, 2.0], args=k, solver=solver, jacobian=jacobian, gradient=gradient)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_an_exact_jacobian_changes_nothing(mode):
    run = {"eager": lambda f: f, "graph": tf.function, "xla": tf.function(jit_compile=True)}[mode]
    mine, computed = run(lambda: [solve(jacobian, rtol=1e-4) for jacobian in (exact_jacobian, None)])()
    np.testing.assert_allclose(mine.ys, computed.ys, rtol=1e-12)
    for a, b in zip(mine.stats, computed.stats, strict=True):
        assert a == b


def test_the_field_is_not_differentiated():
    def field(y):
        return tf.raw_ops.PreventGradient(input=-1000 * y, message="This field has no derivative.")

    with pytest.raises(LookupError, match="no derivative"):
        keras_node.odeint(field, tf.ones((2, 1)), [0.0, 1.0], solver="kvaerno3")
    solution = keras_node.odeint(field, tf.ones((2, 1)), [0.0, 1.0], solver="kvaerno3", jacobian=lambda y: [[-1000.0]])
    np.testing.assert_allclose(solution.ys[-1], np.zeros((2, 1)), atol=1e-5)


@pytest.mark.parametrize(("gradient", "per_sample"), [("checkpointed", False), ("direct", True)])
def test_an_approximate_jacobian_costs_iterations_but_no_digits(gradient, per_sample):
    def approximate(t, y, k):
        return exact_jacobian(t, y, k) * tf.constant([1.0, 1.1, 1.0], tf.float64)

    def gradients(jacobian):
        with tf.GradientTape() as tape:
            tape.watch(K)
            solution = solve(jacobian, K, gradient, method="trbdf2", num_steps=40, per_sample=per_sample)
            value = tf.reduce_sum(solution.ys[-1] * [1.0, 100.0, 2.0])
        return value, tape.gradient(value, K), tf.reduce_sum(solution.stats.num_iterations)

    exact, rough = (tf.function(gradients)(jacobian) for jacobian in (None, approximate))
    assert rough[2] > exact[2]
    np.testing.assert_allclose(rough[0], exact[0], rtol=1e-9)
    np.testing.assert_allclose(rough[1], exact[1], rtol=1e-8)


@keras.saving.register_keras_serializable("test_jacobian")
class Decay(keras.layers.Layer):
    """A field whose method `jacobian` reads its weight. Its first column is wrong, to show that it is used."""

    def build(self, t_shape, y_shape):
        self.rate = self.add_weight(shape=(y_shape[-1],), initializer=keras.initializers.Constant(30.0))

    def call(self, t, y):
        return -self.rate * (y - keras.ops.cos(t))

    def jacobian(self, t, y):
        return -keras.ops.diag(self.rate * [0.6, 1.0])


def test_a_layer_may_have_a_method(tmp_path):
    keras.utils.set_random_seed(0)
    layer = keras_node.ODELayer(Decay(), solver="kvaerno3", track_stats=True, name="ode")
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    first, second = model.fit(x, x, 4, epochs=2, verbose=0).history["loss"]
    assert second < first
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)

    rate = layer.vector_field.rate.numpy()
    plain = keras_node.odeint(lambda t, y: -rate * (y - tf.cos(t)), x, [0.0, 1.0], solver="kvaerno3")
    mine = keras_node.odeint(layer.vector_field, x, [0.0, 1.0], solver="kvaerno3")
    assert mine.stats.num_iterations > plain.stats.num_iterations
    np.testing.assert_allclose(mine.ys, plain.ys, atol=2e-3)


def test_a_state_may_be_a_nest_and_time_may_differ():
    ts = tf.constant([[0.0, 0.0], [1.0, 3.0]], tf.float64)
    y0 = {"a": tf.ones((2, 2, 1), tf.float64), "b": tf.ones((2, 1), tf.float64)}
    matrix = np.array([[-50.0, 0, 1], [0, -2, 0], [0, 0, -1]])

    def field(t, y):
        rows = tf.concat([tf.reshape(y["a"], (-1, 2)), y["b"]], 1)
        rates = tf.linalg.matvec(matrix, rows) * tf.exp(-tf.reshape(t, (-1, 1)))
        return {"a": tf.reshape(rates[:, :2], (-1, 2, 1)), "b": rates[:, 2:]}

    def jacobian(t, y):
        return matrix * tf.exp(-tf.reshape(t, (-1, 1, 1)))

    given, computed = (
        keras_node.odeint(field, y0, ts, solver="esdirk43", jacobian=jacobian) for jacobian in (jacobian, None)
    )
    for name in y0:
        np.testing.assert_allclose(given.ys[name], computed.ys[name], rtol=1e-12)
    assert given.stats.num_iterations == computed.stats.num_iterations


def test_an_explicit_method_takes_no_notice_of_a_method_of_this_name():
    class Field(keras.layers.Layer):
        def call(self, y):
            return -y

        def jacobian(self, one, two, three, four):
            raise NotImplementedError

    y1 = keras_node.odeint(Field(), tf.ones((2, 1)), [0.0, 1.0]).ys[-1]
    np.testing.assert_allclose(y1, np.full((2, 1), np.exp(-1)), rtol=1e-3)


def test_what_does_not_fit_is_refused():
    y0 = tf.ones((2, 3))
    with pytest.raises(ValueError, match=r"Only an implicit method needs a Jacobian(.|\n)*tsit5"):
        keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], jacobian=lambda y: -tf.eye(3))
    with pytest.raises(TypeError, match=r"must be a callable(.|\n)*Received: jacobian=3"):
        keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], solver="trbdf2", jacobian=3)
    with pytest.raises(ValueError, match=r"n is 3(.|\n)*shape \(2, 3\) for a state"):
        keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], solver="trbdf2", jacobian=lambda y: y)
    with pytest.raises(ValueError, match=r"A Jacobian must return a matrix.*is missing. Received: None"):
        keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], solver="trbdf2", jacobian=lambda y: None)


@pytest.mark.parametrize("gradient", ["checkpointed", "direct"])
def test_the_jacobian_is_not_evaluated_at_a_jump(gradient):
    def field(t, y):
        return -2 * (y - tf.where(t < 0.5, tf.constant(1.0, y.dtype), 2.0))

    def jacobian(t, y):
        return tf.fill((2, 1, 1), tf.where(t == 0.5, tf.constant(float("nan"), y.dtype), -2.0))

    solver = RungeKutta("esdirk43", rtol=1e-7, atol=1e-9, step_at=[0.5])

    @tf.function
    def solve(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            y1 = keras_node.odeint(field, y0, [0.0, 1.0], solver=solver, jacobian=jacobian, gradient=gradient).ys[-1]
        return y1, tape.gradient(y1, y0)

    y0 = tf.constant([[0.0], [2.0]], tf.float64)
    y1, derivative = solve(y0)
    middle = 1 + (y0 - 1) * np.exp(-1)
    np.testing.assert_allclose(y1, 2 + (middle - 2) * np.exp(-1), rtol=1e-5)
    np.testing.assert_allclose(derivative, np.full((2, 1), np.exp(-2)), rtol=1e-4)
