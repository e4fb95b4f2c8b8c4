"""Events and jumps in models: training, saving, exporting, shapes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import Event


@keras.saving.register_keras_serializable(package="tests")
class Level(keras.layers.Layer):
    """An event function `y[:, 0] - level` with a trained level."""

    def build(self, y_shape):
        self.level = self.add_weight(shape=(), initializer="ones", name="level")

    def call(self, y):
        return y[:, 0] - self.level


@keras.saving.register_keras_serializable(package="tests")
class Rebound(keras.layers.Layer):
    """A reset of `(height, velocity)` with a trained restitution."""

    def build(self, t_shape, y_shape):
        self.restitution = self.add_weight(shape=(), initializer=keras.initializers.Constant(0.9), name="e")

    def call(self, t, y):
        return keras.ops.stack([y[:, 0], -self.restitution * y[:, 1]], axis=1)


@keras.saving.register_keras_serializable(package="tests")
def growth(t, y):
    return y


@keras.saving.register_keras_serializable(package="tests")
def fall(t, y):
    return keras.ops.stack([y[:, 1], -9.8 * keras.ops.ones_like(y[:, 1])], axis=1)


def test_fit_trains_the_weights_of_an_event_function():
    # y = y0 e^t reaches the level at log(level / y0), so the times of events tell the level.
    level = Level()
    solver = keras_node.RungeKutta(rtol=1e-6)
    layer = keras_node.ODELayer(growth, t1=10.0, event=Event(level), return_events=True, solver=solver)
    inputs = keras.Input((1,))
    _, times, *_ = layer(inputs)
    model = keras.Model(inputs, times)
    assert model.trainable_variables[0] is level.level
    x = np.random.default_rng(0).uniform(0.1, 0.9, (64, 1)).astype("float32")
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x, np.log(3.0 / x), batch_size=32, epochs=60, verbose=0)
    np.testing.assert_allclose(level.level, 3.0, rtol=2e-3)
    # The gradient of the mean squared error, in closed form.
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - np.log(2.0 / x)) ** 2)
    now = float(level.level)
    np.testing.assert_allclose(tape.gradient(loss, level.level.value), 2 * np.log(now / 2) / now, rtol=1e-4)


def bouncing_layer(level, rebound):
    event = Event(level, direction=-1, reset=rebound)
    solver = keras_node.RungeKutta("heun", max_steps=64)  # exact for a parabola
    return keras_node.ODELayer(fall, t1=2.0, event=event, max_events=3, return_events=True, solver=solver)


X = np.array([[5.9, 0.0], [2.2, 1.0], [30.0, 0.0]], "float32")


def constant(value):
    return keras.initializers.Constant(value)


def assert_same(actual, expected):
    for a, b in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_saved_model_has_its_events_and_their_weights(tmp_path):
    inputs = keras.Input((2,))
    symbolic = bouncing_layer(Level(), Rebound())(inputs, ts=[1.0, 2.0])
    model = keras.Model(inputs, symbolic)
    for variable, value in zip(model.trainable_variables, (0.95, 0.92), strict=True):
        variable.assign(value)
    expected = model.predict(X, verbose=0)
    _, times, _, _, count = expected
    assert [value.shape for value in expected] == [(3, 2, 2), (3, 3), (3, 3), (3, 3, 2), (3,)]
    np.testing.assert_array_equal(count, [1, 2, 0])
    np.testing.assert_allclose(times[0, 0], np.sqrt(2 * 4.95 / 9.8), rtol=1e-5)
    # What Keras expects symbolically is what comes.
    for spec, value in zip(keras.tree.flatten(symbolic), keras.tree.flatten(expected), strict=True):
        assert spec.shape[1:] == value.shape[1:]
        assert spec.dtype == value.dtype.name
    model.save(tmp_path / "model.keras")
    assert_same(keras.models.load_model(tmp_path / "model.keras").predict(X, verbose=0), expected)
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert_same(loaded.serve(X), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["onnx", "litert"])
def test_a_model_with_events_runs_in_another_runtime(format, tmp_path):
    # ONNX has no derivative of a slice, so what an event changes is chosen by a matrix.
    height = keras.layers.Dense(1, kernel_initializer=constant([[1.0], [0.0]]), bias_initializer=constant(-1.0))
    rebound = keras.layers.Dense(2, kernel_initializer=constant([[1.0, 0.0], [0.0, -0.9]]))
    inputs = keras.Input((2,))
    model = keras.Model(inputs, bouncing_layer(height, rebound)(inputs, ts=[1.0, 2.0]))
    expected = model.predict(X, verbose=0)
    path = str(tmp_path / ("model.onnx" if format == "onnx" else "model.tflite"))
    if format == "onnx":
        pytest.importorskip("tf2onnx")
        onnxruntime = pytest.importorskip("onnxruntime")
        model.export(path, format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(path)
        actual = session.run(None, {session.get_inputs()[0].name: X})
    else:
        litert = pytest.importorskip("ai_edge_litert.interpreter")
        model.export(path, format="litert", verbose=False)
        interpreter = litert.Interpreter(path)
        interpreter.resize_tensor_input(0, X.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], X)
        interpreter.invoke()
        actual = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
    for value in tf.nest.flatten(expected):
        same = [a for a in actual if a.shape == value.shape]
        assert any(np.allclose(a, value, rtol=1e-4, atol=1e-4, equal_nan=True) for a in same)


def test_a_layer_gives_jumps_to_samples_of_a_batch():
    layer = keras_node.ODELayer(keras.layers.Dense(2, use_bias=False, kernel_initializer="zeros"), augment_dims=1)
    times, amounts = keras.Input((2,)), keras.Input((2, 1))
    inputs = keras.Input((1,))
    model = keras.Model([inputs, times, amounts], layer(inputs, ts=[0.4, 1.0], jumps=(times, amounts)))
    x = np.array([[1.0], [2.0], [3.0]], "float32")
    t = np.array([[0.2, 0.3], [0.7, 0.1], [0.9, 5.0]], "float32")
    a = np.array([[[1.0], [10.0]], [[2.0], [20.0]], [[3.0], [30.0]]], "float32")
    actual = model.predict([x, t, a], verbose=0)
    assert actual.shape == (3, 2, 2)
    np.testing.assert_allclose(actual[..., 0], [[12, 12], [22, 24], [3, 6]], rtol=1e-6)
    np.testing.assert_array_equal(actual[..., 1], 0)
    shared = layer(x, jumps=([0.5], np.ones((1, 1))))
    np.testing.assert_allclose(shared[:, 0], [2, 3, 4], rtol=1e-6)


def test_an_event_has_a_config_and_refuses_what_makes_no_sense():
    several = keras_node.ODELayer(growth, event=[Event(Level()), Event(growth, terminal=False)])
    again = keras_node.ODELayer.from_config(several.get_config())
    assert repr(again.event) == repr(several.event)
    assert again.get_config() == several.get_config()
    event = Event(Level(), direction=1, terminal=False, name="level")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(event))
    assert repr(again) == repr(event) == "Event('level', direction=1, terminal=False)"
    with pytest.raises(ValueError, match="must be -1, 0 or 1"):
        Event(Level(), direction=2)
    with pytest.raises(ValueError, match="a `reset` has no effect"):
        Event(Level(), terminal=True, reset=Rebound())
    with pytest.raises(TypeError, match="An event function must be a Keras layer or a callable"):
        Event(3.0)
    with pytest.raises(TypeError, match=r"`event` must be a `keras_node.Event`"):
        keras_node.ODELayer(growth, event=Level())
    with pytest.raises(ValueError, match="`return_events` needs an `event`"):
        keras_node.ODELayer(growth, return_events=True)
    with pytest.raises(ValueError, match="max_events"):
        keras_node.ODELayer(growth, event=event, max_events=0)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda t, y: y, ValueError, r"one number for each sample"),
        (lambda t, y: y[:, 0] - t, ValueError, r"take `y\[:, :1\]` with `t`"),
        (lambda t, y: tf.reduce_sum(y), ValueError, r"Received: shape=\(\) for a state of shape \(3, 2\)"),
        (lambda t, y: y[:, 0] > 0, TypeError, r"and not whether the event has happened"),
    ],
)
def test_an_error_says_what_an_event_function_must_return(function, error, message):
    with pytest.raises(error, match=message):
        keras_node.odeint(fall, tf.constant(X), [0.0, 1.0], event=Event(function))


def test_an_error_says_what_a_reset_must_return():
    event = Event(lambda t, y: y[:, 0], reset=lambda t, y: y[:, :1])
    with pytest.raises(
        ValueError, match="A reset must return the shape of the state, because it returns its new value"
    ):
        keras_node.odeint(fall, tf.constant(X), [0.0, 3.0], event=event)
    with pytest.raises(ValueError, match="every tensor of the state must have a batch axis"):
        keras_node.odeint(lambda t, y: -y, 1.0, [0.0, 3.0], event=event)


def test_statistics_count_the_work_of_solves_with_events():
    layer = keras_node.ODELayer(fall, t1=2.0, event=Event(Level(), direction=-1), track_stats=True)
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile("adam", "mse")
    logs = model.evaluate(X, X, verbose=0, return_dict=True)
    plain = keras_node.odeint(fall, X, [0.0, 2.0], event=layer.event).stats
    evaluations = logs[f"{layer.name}_evaluations"]
    np.testing.assert_allclose(evaluations, np.mean(plain.num_evaluations), rtol=1e-6)
