"""ODELayer as a Keras user meets it: in models, in fit, on disk, elsewhere."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

TIGHT = keras_node.RungeKutta("bosh3", rtol=1e-5, atol=1e-7)


def mlp(units, hidden=16, **kwargs):
    return keras.Sequential([keras.layers.Dense(hidden, activation="tanh", **kwargs), keras.layers.Dense(units)])


def classifier(**kwargs):
    keras.utils.set_random_seed(1)
    ode = keras_node.ODELayer(mlp(6), **{"solver": "bosh3", **kwargs})
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(6), ode, keras.layers.Dense(2)])


@keras.saving.register_keras_serializable(package="keras_node_tests")
def rotation(t, y, args=None):
    return tf.stack([-y[..., 1], y[..., 0]], axis=-1)


@keras.saving.register_keras_serializable(package="keras_node_tests")
def decay(y):
    return -y


@keras.saving.register_keras_serializable(package="keras_node_tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.ode = keras_node.ODELayer(mlp(4))
        self.head = keras.layers.Dense(2)

    def call(self, x, training=None):
        return self.head(self.ode(x, training=training))


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    return x, (x[:, 0] * x[:, 1] > 0).astype("int32")


@pytest.mark.parametrize(
    ("options", "jit_compile"),
    [
        pytest.param({}, False, marks=pytest.mark.traced_twice),
        ({}, True),
        ({"gradient": "checkpointed"}, True),
        ({"gradient": "direct", "solver": "rk4"}, False),
    ],
    ids=str,
)
def test_fit_trains_with_and_without_xla(data, options, jit_compile):
    model = classifier(**options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, jit_compile=jit_compile)
    history = model.fit(*data, epochs=15, batch_size=32, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]


def test_a_subclassed_model_trains_and_is_saved(data, tmp_path):
    model = Subclassed()
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(*data, epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(data[0]), model(data[0]))


@pytest.mark.parametrize(
    ("gradient", "jit_compile"),
    [("backsolve", True), ("checkpointed", False), ("direct", True), ("reversible", False)],
)
def test_an_unknown_batch_size(gradient, jit_compile):
    layer = keras_node.ODELayer(mlp(3), solver=keras_node.RungeKutta("bosh3", max_steps=64), gradient=gradient)
    layer(tf.ones((1, 3)))

    @tf.function(input_signature=[tf.TensorSpec((None, 3))], jit_compile=jit_compile)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, ts=[0.5, 1.0])
            value = tf.reduce_sum(y)
        return y, tape.gradient(value, x)

    x = tf.constant(np.random.default_rng(0).normal(size=(5, 3)), tf.float32)
    for batch in (5,) if jit_compile else (5, 2):  # XLA compiles for every size
        states, gradients = step(x[:batch])
        assert states.shape == (batch, 2, 3)
        np.testing.assert_allclose(states, layer(x[:batch], ts=[0.5, 1.0]), rtol=1e-4, atol=1e-5)
        assert np.isfinite(gradients).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_layer_inside_the_field_of_another(gradient):
    """dz/ds = -z over one unit of time maps y to y / e, so dy/dt = y / e."""
    solver = keras_node.RungeKutta("bosh3", num_steps=16)
    inner = keras_node.ODELayer(decay, solver=solver, gradient=gradient)
    outer = keras_node.ODELayer(inner, solver=solver, gradient=gradient)
    x = tf.constant([[1.0, 2.0]])

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = outer(x)
        return y, tape.gradient(y, x)

    y, gradients = step(x)
    np.testing.assert_allclose(y, x * np.exp(np.exp(-1)), rtol=1e-4)
    np.testing.assert_allclose(gradients, np.full((1, 2), np.exp(np.exp(-1))), rtol=1e-4)


def test_a_model_is_cloned():
    model = classifier(gradient="checkpointed")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = tf.ones((2, 4))
    np.testing.assert_array_equal(clone(x), model(x))
    assert clone.layers[1].vector_field is not model.layers[1].vector_field


def test_several_layers_and_a_shared_field_have_right_gradients():
    shared = mlp(3)
    inputs = keras.Input((3,))
    x = keras_node.ODELayer(shared, solver=TIGHT)(inputs)
    x = keras_node.ODELayer(mlp(3), t1=0.5, solver=TIGHT)(x)
    outputs = keras_node.ODELayer(shared, t0=1.0, t1=0.0, solver=TIGHT)(x)
    model = keras.Model(inputs, outputs)
    assert len(model.trainable_variables) == 8
    x = tf.constant(np.random.default_rng(1).normal(size=(2, 3)), tf.float32)

    def value():
        return tf.reduce_sum(model(x) ** 2)

    with tf.GradientTape() as tape:
        loss = value()
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        direction = np.random.default_rng(2).normal(size=variable.shape).astype("float32")
        before, values = variable.numpy(), []
        for sign in (1, -1):
            variable.assign(before + sign * 1e-2 * direction)
            values.append(float(value()))
        variable.assign(before)
        np.testing.assert_allclose(np.sum(gradient * direction), (values[0] - values[1]) / 2e-2, rtol=2e-2, atol=2e-3)


def test_dropout_draws_one_mask_for_a_solve_and_another_for_the_next():
    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = keras.layers.Dropout(0.5, seed=0)

        def call(self, y, training=None):
            return self.dropout(keras.ops.ones_like(y), training=training)

    layer = keras_node.ODELayer(Noise())
    x = tf.zeros((1, 200))
    first, second = layer(x, training=True).numpy(), layer(x, training=True).numpy()
    for result in (first, second):
        assert np.all(np.isclose(result, 0, atol=1e-5) | np.isclose(result, 2, atol=1e-5))
        assert 50 < np.count_nonzero(result > 1) < 150
    assert np.any(np.abs(first - second) > 1)
    np.testing.assert_allclose(layer(x, training=False), np.ones((1, 200)), rtol=1e-5)


def test_regularizers_count_once():
    layer = keras_node.ODELayer(mlp(3, kernel_regularizer=keras.regularizers.L2(0.1)))
    layer(tf.ones((2, 3)))
    kernel = layer.vector_field.layers[0].kernel
    assert len(layer.losses) == 1
    np.testing.assert_allclose(layer.losses[0], 0.1 * np.sum(kernel.numpy() ** 2), rtol=1e-6)


def test_frozen_weights_stay(data):
    model = classifier()
    model.layers[1].vector_field.layers[0].trainable = False
    before = [v.numpy() for v in model.layers[1].vector_field.weights]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*data, epochs=1, verbose=0)
    after = [v.numpy() for v in model.layers[1].vector_field.weights]
    assert all(np.array_equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert not np.array_equal(before[2], after[2])


def test_times_give_the_states_at_them():
    layer = keras_node.ODELayer(rotation, solver=TIGHT)
    x = tf.constant([[1.0, 0.0], [0.0, 2.0]])
    shared = layer(x, ts=[0.0, 0.5, 1.0])
    assert shared.shape == (2, 3, 2)
    np.testing.assert_allclose(shared[:, -1], layer(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(shared[:, 0], x)
    ts = tf.constant([[0.5, 1.0, 1.5], [0.1, 0.2, 0.2]])
    own = layer(x, ts=ts)
    np.testing.assert_allclose(own[0, :, 0], np.cos(ts[0]), atol=1e-4)
    np.testing.assert_allclose(own[1, :, 1], 2 * np.cos(ts[1]), atol=1e-4)


def test_shapes_are_known_beforehand():
    layer = keras_node.ODELayer(mlp(5), augment_dims=2)
    x = keras.Input((3,))
    assert layer(x).shape == (None, 5)
    assert layer(x, ts=keras.Input((7,))).shape == (None, 7, 5)
    assert layer(x, ts=[0.1, 0.2]).shape == (None, 2, 5)
    assert layer.compute_output_shape((None, 3)) == (None, 5)
    assert layer.compute_output_shape((4, 3), ts_shape=(7,)) == (4, 7, 5)
    assert layer(tf.ones((4, 3)), ts=tf.ones((4, 7))).shape == (4, 7, 5)


def test_a_state_in_a_dict_goes_through_a_functional_model():
    @keras.saving.register_keras_serializable(package="keras_node_tests")
    class Spring(keras.layers.Layer):
        def call(self, y):
            return {"x": y["v"], "v": -y["x"]}

    inputs = {"x": keras.Input((2,), name="x"), "v": keras.Input((2,), name="v")}
    model = keras.Model(inputs, keras_node.ODELayer(Spring(), t1=float(np.pi), solver=TIGHT)(inputs))
    outputs = model({"x": tf.ones((3, 2)), "v": tf.zeros((3, 2))})
    np.testing.assert_allclose(outputs["x"], -np.ones((3, 2)), atol=1e-4)


def test_arguments_reach_the_field():
    @keras.saving.register_keras_serializable(package="keras_node_tests")
    class Controlled(keras.layers.Layer):
        def call(self, t, y, args):
            return args["push"] * keras.ops.ones_like(y)

    layer = keras_node.ODELayer(Controlled())
    outputs = layer(tf.zeros((2, 3)), args={"push": tf.constant([[1.0], [2.0]])})
    np.testing.assert_allclose(outputs, [[1.0] * 3, [2.0] * 3], rtol=1e-5)


def test_numbers_beside_inputs_reach_the_field(tmp_path):
    x, rate = keras.Input((2,)), keras.Input((1,))
    layer = keras_node.ODELayer(decays_by_arguments, solver=keras_node.RungeKutta("rk4", num_steps=20))
    model = keras.Model([x, rate], layer(x, args={"rates": (rate, 0.5), "number": 2}))
    inputs = [np.ones((3, 2), "float32"), np.array([[0.1], [0.2], [0.3]], "float32")]
    np.testing.assert_allclose(model(inputs), np.exp(-2 * (inputs[1] + 0.5)) * inputs[0], rtol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(inputs), model(inputs))


@keras.saving.register_keras_serializable(package="test_ode_layer")
def decays_by_arguments(t, y, args):
    return -(args["rates"][0] + args["rates"][1]) * tf.cast(args["number"], y.dtype) * y


@keras.saving.register_keras_serializable(package="test_ode_layer")
class OnlyTheEnd(keras_node.ODELayer):
    def call(self, inputs, ts=None, training=None):
        return super().call(inputs, ts, training=training) - inputs


def test_a_subclass_need_not_take_all_arguments_of_call(tmp_path):
    layer = OnlyTheEnd(keras.layers.Dense(3), solver=keras_node.RungeKutta("euler", num_steps=1))
    model = keras.Sequential([keras.Input((3,)), layer])
    x = np.ones((2, 3), "float32")
    np.testing.assert_allclose(model(x), layer.vector_field(x), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), model(x))


def test_saved_and_loaded_a_model_gives_the_same(tmp_path, data):
    inputs = keras.Input((4,))
    gradient = keras_node.BacksolveAdjoint(
        solver=keras_node.RungeKutta("dopri5", rtol=1e-4), norm="full", num_checkpoints=2
    )
    x = keras_node.ODELayer(mlp(5), t1=0.7, solver=TIGHT, gradient=gradient, augment_dims=1)(inputs)
    x = keras.layers.Dense(2)(x)
    x = keras_node.ODELayer(decay, gradient=keras_node.CheckpointedAdjoint(num_checkpoints=7))(x)
    model = keras.Model(inputs, keras_node.ODELayer(rotation, solver="rk4", gradient="direct")(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(data[0]), model(data[0]))
    for old, new in zip(model.layers, loaded.layers, strict=True):
        assert {**old.get_config(), "vector_field": 0} == {**new.get_config(), "vector_field": 0}
    assert loaded.layers[1].gradient.solver.rtol == 1e-4


def test_an_exported_model_is_served_without_keras_node(tmp_path, data):
    model = classifier(solver=TIGHT)
    expected = model(data[0][:7])
    model.export(tmp_path / "served", verbose=False)
    np.save(tmp_path / "x.npy", data[0][:7])
    script = (
        "import sys; sys.modules['keras_node'] = None; sys.modules['keras'] = None\n"
        "import numpy as np, tensorflow as tf\n"
        "served = tf.saved_model.load('served')\n"
        "np.save('y.npy', served.serve(np.load('x.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_precisions_train(data, policy):
    keras.utils.set_random_seed(0)
    field = keras.Sequential(
        [keras.layers.Dense(8, activation="tanh", dtype=policy), keras.layers.Dense(4, dtype=policy)]
    )
    layer = keras_node.ODELayer(field, solver="bosh3", dtype=policy)
    assert layer(data[0]).dtype == layer.compute_dtype
    model = keras.Sequential([layer, keras.layers.Dense(2, dtype="float32")])
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(*data, epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_batch_normalization_in_training_is_refused_by_name():
    field = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization(name="the_culprit")])
    layer = keras_node.ODELayer(field)
    with pytest.raises(ValueError, match="the_culprit"):
        layer(tf.ones((2, 3)), training=True)
    assert layer(tf.ones((2, 3)), training=False).shape == (2, 3)


def test_a_loss_inside_the_field_is_refused():
    with pytest.raises(ValueError, match="activity regularizers"):
        keras_node.ODELayer(keras.layers.Dense(3, activity_regularizer="l2"))(tf.ones((2, 3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), [0.0]), ValueError, "one more time at least"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), tf.ones((2, 3, 4))), ValueError, r"\(2, 3, 4\)"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), [0.0, 2.0, 1.0]), ValueError, "monotonic"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), [0.0, np.nan]), ValueError, "finite"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2, tf.int32), [0.0, 1.0]), TypeError, "int32"),
        (lambda: keras_node.odeint(lambda y: y[:1], tf.ones(2), [0.0, 1.0]), ValueError, r"shape=\(1,\)"),
        (lambda: keras_node.odeint(lambda y: (y, y), tf.ones(2), [0.0, 1.0]), ValueError, "structure"),
        (lambda: keras_node.odeint(lambda y: tf.cast(y, tf.int32), tf.ones(2), [0.0, 1.0]), TypeError, "int32"),
        (lambda: keras_node.odeint(lambda a, b, c, d: a, tf.ones(2), [0.0, 1.0]), ValueError, "a, b, c, d"),
        (lambda: keras_node.odeint(3, tf.ones(2), [0.0, 1.0]), TypeError, "Received: 3"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), [0.0, 1.0], args=1.0), ValueError, "args"),
        (lambda: keras_node.ODELayer(mlp(2))(keras.Input((2,)), args=keras.Input((2,))), ValueError, "args=<KerasT"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), [0.0, 1.0], solver="rk5"), ValueError, "rk5"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(2), [0.0, 1.0], gradient="adjoint"), ValueError, "adjoint"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones(()), [[0.0], [1.0]]), ValueError, "batch"),
        (lambda: keras_node.odeint(lambda y: y, tf.ones((3, 1)), np.ones((2, 2))), ValueError, "batch of 2"),
        (lambda: keras_node.RungeKutta("rk4"), ValueError, "num_steps"),
        (lambda: keras_node.RungeKutta("rk4", step_size=0.1, num_steps=3), ValueError, "not both"),
        (lambda: keras_node.RungeKutta("tsit5", rtol=0.0), ValueError, "rtol"),
        (lambda: keras_node.RungeKutta("tsit5", atol=-1.0), ValueError, "atol"),
        (lambda: keras_node.RungeKutta("rk4", num_steps=2, rtol=1e-5), ValueError, "no effect"),
        (lambda: keras_node.RungeKutta("tsit5", max_steps=0), ValueError, "max_steps"),
        (lambda: keras_node.BacksolveAdjoint(norm="max"), ValueError, "max"),
        (lambda: keras_node.ODELayer(lambda y: y, t1=np.inf), ValueError, "inf"),
        (lambda: keras_node.ODELayer(lambda y: y, augment_dims=-1), ValueError, "-1"),
        (lambda: keras_node.ODELayer(lambda y: y)(tf.ones((2, 3), tf.int32)), TypeError, "int32"),
        (lambda: keras_node.ODELayer(keras.layers.Dense(4))(keras.Input((3,))), ValueError, "shape of the state"),
        (
            lambda: keras_node.ODELayer(mlp(2))(tf.ones((3, 2)), ts=np.ones((4, 3))),
            ValueError,
            r"\(4, 3\) for a batch of 3",
        ),
    ],
)
def test_bad_input_is_refused_with_what_arrived(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_import_is_light_and_needs_the_tensorflow_backend():
    light = "import sys, keras_node; assert not {'tensorflow_probability', 'tf_keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True, capture_output=True)
    other = (
        "import sys, types; keras = sys.modules['keras'] = types.ModuleType('keras');"
        "keras.backend = types.SimpleNamespace(backend=lambda: 'jax'); import keras_node"
    )
    result = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert "keras_node needs Keras on the TensorFlow backend" in result.stderr


class _Private(keras.layers.Layer):
    def call(self, y):
        return -y


def test_the_name_of_a_field_may_begin_with_an_underscore():
    model = keras.Sequential([keras.Input((2,)), keras_node.ODELayer(_Private())])
    model.compile("sgd", "mse", jit_compile=False)
    history = model.fit(np.ones((4, 2)), np.zeros((4, 2)), verbose=0).history
    np.testing.assert_allclose(history["loss"], np.exp(-2), rtol=1e-2)


def test_times_of_a_layer_are_constants_and_those_of_a_call_may_be_trained():
    for time in (keras.Variable(1.0), tf.Variable(1.0)):
        with pytest.raises(ValueError, match=r"`t1` is a constant of the layer.*Received: t1="):
            keras_node.ODELayer(lambda y: -y, t1=time)
    for time in (None, "1", float("nan")):
        with pytest.raises(ValueError, match=r"`t0` must be a number. Received: t0="):
            keras_node.ODELayer(lambda y: -y, t0=time)
    with pytest.raises(ValueError, match=r"`t1` must be a finite number. Received: t1=inf"):
        keras_node.ODELayer(lambda y: -y, t1=float("inf"))
    layer, y0 = keras_node.ODELayer(lambda y: -y, solver="rk4"), tf.ones((1, 1))
    with tf.GradientTape() as tape:
        end = tf.constant(1.0)
        tape.watch(end)
        y = layer(y0, ts=[0.5, end])  # numbers and tensors
    np.testing.assert_allclose(y[0, :, 0], np.exp([-0.5, -1.0]), rtol=1e-4)
    np.testing.assert_allclose(tape.gradient(y, end), -np.exp(-1), rtol=1e-3)
