"""Mixed precision: state, time and error control in single, the field in half."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

POLICIES = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}


@pytest.fixture(params=POLICIES)
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.fixture
def float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


def test_the_solver_hands_single_precision_to_a_field_that_computes_in_half(policy):
    dense, seen = keras.layers.Dense(2), set()

    def field(t, y):
        dy = dense(y)
        seen.add((t.dtype.name, y.dtype.name, dy.dtype.name))
        return dy

    layer = keras_node.ODELayer(field)
    assert layer(tf.ones((3, 2))).dtype == POLICIES[policy]
    assert seen == {("float32", "float32", POLICIES[policy])}


def test_state_and_time_move_where_half_precision_would_stand_still(policy):
    # Neighbours of 2048 are 2 apart in float16 and 16 apart in bfloat16; each step is 1/2.
    kernel = keras.initializers.Zeros()
    field = keras.layers.Dense(1, kernel_initializer=kernel, bias_initializer="ones")
    solver = keras_node.RungeKutta("rk4", num_steps=32)
    layer = keras_node.ODELayer(field, t0=2048.0, t1=2064.0, solver=solver)
    np.testing.assert_array_equal(tf.cast(layer(tf.fill((2, 1), 2048.0)), tf.float32), 2064.0)


def test_the_error_is_controlled_in_single_precision(policy):
    def exact_in_half(y):  # a field in half precision that rounds nothing
        return tf.cast(tf.sign(tf.cast(y, POLICIES[policy])), y.dtype)

    # Tolerances below the resolution of half precision hold: steps are as few as this solution needs.
    solver = keras_node.RungeKutta("tsit5", rtol=1e-6, atol=1e-6)
    solution = keras_node.odeint(exact_in_half, tf.fill((2, 1), 0.1), [0.0, 1.0], solver=solver)
    np.testing.assert_allclose(solution.ys[-1], 1.1, rtol=1e-6)
    assert solution.stats.num_rejected == 0


def test_gradients_are_those_of_single_precision_to_the_resolution_of_half(policy):
    keras.utils.set_random_seed(0)
    x = keras.random.normal((16, 4), dtype="float32")
    gradients, weights = [], None
    for dtype in (policy, "float32"):
        field = keras.Sequential([keras.layers.Dense(8, "tanh", dtype=dtype), keras.layers.Dense(4, dtype=dtype)])
        layer = keras_node.ODELayer(field, solver="rk4", dtype=dtype)
        layer.build((None, 4))
        weights = weights or layer.get_weights()
        layer.set_weights(weights)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(layer(x), tf.float32) ** 2)
        gradients.append(tape.gradient(loss, [v.value for v in layer.trainable_variables]))
    resolution = 2**-11 if policy == "mixed_float16" else 2**-8
    for half, single in zip(*gradients, strict=True):
        assert half.dtype == tf.float32
        assert np.max(np.abs(half - single)) < 4 * resolution * np.max(np.abs(single))


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "direct"])
@pytest.mark.parametrize(("scale", "where"), [(1e4, "before"), (20.0, "inside")])
def test_a_step_that_overflows_is_skipped(float16, gradient, scale, where):
    # The loss scale begins at 2 ** 15. A loss of 1e4 overflows on its way to the layer; the smaller one does in the
    # field, whose vector-Jacobian product is eight times the adjoint at first.
    field = keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.Constant(2.0))
    layer = keras_node.ODELayer(field, solver="rk4", gradient=gradient, jit_compile=False)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    x = np.full((8, 4), 0.01, "float32")
    before = model.get_weights()
    model.fit(x, np.full((8, 4), scale, "float32"), verbose=0)
    assert float(model.optimizer.dynamic_scale) == 2.0**14
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model.fit(x, np.full((8, 4), 1.0, "float32"), verbose=0)
    assert all(np.all(np.isfinite(new)) for new in model.get_weights())
    assert any(np.any(old != new) for old, new in zip(before, model.get_weights(), strict=True))


def test_an_overflow_in_single_precision_still_raises():
    field = keras.layers.Dense(4, kernel_initializer=keras.initializers.Constant(1e30))
    layer = keras_node.ODELayer(field, solver="rk4", jit_compile=False)
    layer.build((None, 4))
    x = tf.zeros((1, 4))  # at rest, while its adjoint is not
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="solve of the adjoint"):
        tape.gradient(y, x)


class InSinglePrecision(keras.layers.Layer):
    """A field that computes in half precision and returns single precision."""

    def __init__(self):
        super().__init__(autocast=False)
        self.dense = keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.Constant(2.0))

    def build(self, shape):
        self.dense.build(shape)

    def call(self, y):
        return keras.ops.cast(self.dense(y), "float32")


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("kind", ["cast", "last layer"])
def test_a_field_that_returns_single_precision_may_overflow_in_half(float16, kind, run_eagerly):
    field = InSinglePrecision()
    if kind == "last layer":
        last = keras.layers.Dense(4, dtype="float32", kernel_initializer="identity")
        dense = keras.layers.Dense(4, "tanh", kernel_initializer=keras.initializers.Constant(2.0))
        field = keras.Sequential([dense, last])
    layer = keras_node.ODELayer(field, solver="rk4", jit_compile=False)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False, run_eagerly=run_eagerly)
    before = model.get_weights()
    model.fit(np.full((8, 4), 0.01, "float32"), np.full((8, 4), 20.0, "float32"), verbose=0)
    assert float(model.optimizer.dynamic_scale) == 2.0**14
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_neural_cde_in_half_precision(dtype):
    x = np.cumsum(np.random.default_rng(0).normal(size=(2, 4, 2)), axis=1).astype("float32")
    times = np.tile([0.0, 0.3, 0.5, 1.0], (2, 1)).astype("float32")
    keras.utils.set_random_seed(0)
    half = keras_node.NeuralCDE(3, dtype=dtype)
    z = half(x, times)
    single = keras_node.NeuralCDE(3)
    single(x, times)
    single.set_weights([w.astype("float32") for w in half.get_weights()])
    assert z.dtype == dtype
    np.testing.assert_allclose(tf.cast(z, "float32"), single(x, times), atol=0.05)
