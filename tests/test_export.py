"""Models that leave Keras: ONNX and LiteRT, with the adaptive loop inside."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

SOLVERS = {
    "adaptive": keras_node.RungeKutta("bosh3", rtol=1e-6, atol=1e-7),
    "fixed": keras_node.RungeKutta("midpoint", num_steps=4),
    "implicit": keras_node.RungeKutta("trbdf2", rtol=1e-5, atol=1e-6),
}
BUILTINS = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
TIMES = np.cumsum(np.random.default_rng(1).uniform(size=(3, 5)), axis=1).astype("float32")


def field():
    return keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)])


class FieldWithJacobian(keras.layers.Layer):
    """The same field. An implicit method does not differentiate it."""

    def build(self, shape):
        self.kernels = [self.add_weight(shape=(4, 8)), self.add_weight(shape=(8, 4))]

    def call(self, y):
        return keras.ops.tanh(y @ self.kernels[0]) @ self.kernels[1]

    def jacobian(self, y):
        slope = 1 - keras.ops.tanh(y @ self.kernels[0]) ** 2
        return keras.ops.transpose(self.kernels[0] @ (slope[:, :, None] * self.kernels[1]), (0, 2, 1))


def ode_model(solver, field=field):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras_node.ODELayer(field(), solver=solver), keras.layers.Dense(2)])


def run_onnx(path, inputs):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [node.name for node in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def run_litert(path, inputs):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(path)  # without the Flex delegate
    given = {len(details["shape"]): details["index"] for details in interpreter.get_input_details()}
    for x in inputs:
        interpreter.resize_tensor_input(given[x.ndim], x.shape)
    interpreter.allocate_tensors()
    for x in inputs:
        interpreter.set_tensor(given[x.ndim], x)
    interpreter.invoke()
    (result,) = interpreter.get_output_details()
    return interpreter.get_tensor(result["index"])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, tmp_path):
    pytest.importorskip("tf2onnx")
    # ONNX has no derivative of tanh, which the Jacobian needs.
    model = ode_model(SOLVERS[name], FieldWithJacobian if name == "implicit" else field)
    expected = model.predict(X, verbose=0)  # Keras exports to ONNX what has been called
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    np.testing.assert_allclose(run_onnx(path, [X]), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_an_implicit_method(tmp_path):
    pytest.importorskip("tf2onnx")
    layer = keras_node.ODELayer(keras.layers.Dense(4), solver=SOLVERS["implicit"])
    model = keras.Sequential([keras.Input((4,)), layer])
    expected = model.predict(X, verbose=0)
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    np.testing.assert_allclose(run_onnx(str(tmp_path / "model.onnx"), [X]), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_recurrent_layer(tmp_path):
    pytest.importorskip("tf2onnx")
    keras.utils.set_random_seed(0)
    x, times, mask = keras.Input((None, 3)), keras.Input((None,)), keras.Input((None,), dtype="bool")
    layer = keras_node.ODERNN(keras.layers.GRUCell(4), field(), solver=SOLVERS["adaptive"], return_sequences=True)
    model = keras.Model([x, times, mask], layer(x, times, mask=mask))
    values = np.random.default_rng(2).normal(size=(3, 5, 3)).astype("float32")
    inputs = [values, TIMES, np.random.default_rng(3).uniform(size=(3, 5)) < 0.7]
    expected = model.predict(inputs, verbose=0)
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    np.testing.assert_allclose(run_onnx(path, inputs), expected, atol=1e-5)


def latent_ode_model():
    mask = np.random.default_rng(3).uniform(size=(3, 5, 2)) < 0.7
    values = np.stack([np.sin(TIMES)] * 2, axis=-1)
    return keras_node.LatentODE(2, units=4, solver=SOLVERS["fixed"]), (TIMES, values, mask)


def flow_model():
    # ONNX has no derivative of tanh, the default.
    smooth = keras_node.ConcatSquashField((4,), activation="softplus")
    return keras_node.ContinuousFlow(4, smooth, solver=SOLVERS["fixed"]), X


@pytest.mark.parametrize("make", [latent_ode_model, flow_model])
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_model(make, tmp_path):
    pytest.importorskip("tf2onnx")
    keras.utils.set_random_seed(0)
    model, inputs = make()
    expected = model.predict(inputs, verbose=0)
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    np.testing.assert_allclose(run_onnx(path, tf.nest.flatten(inputs)), expected, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.filterwarnings("ignore")
def test_litert_with_builtin_operators_only(name, tmp_path):
    model = ode_model(SOLVERS[name])
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    np.testing.assert_allclose(run_litert(path, [X]), model.predict(X, verbose=0), atol=1e-5)


@pytest.mark.parametrize("name", ["adaptive", "fixed"])
@pytest.mark.filterwarnings("ignore")
def test_litert_of_a_recurrent_layer_with_builtin_operators_only(name, tmp_path):
    keras.utils.set_random_seed(0)
    x, times, mask = keras.Input((5, 3)), keras.Input((5,)), keras.Input((5, 1, 1), dtype="bool")
    layer = keras_node.ODERNN(keras.layers.GRUCell(4), field(), solver=SOLVERS[name])
    model = keras.Model([x, times, mask], layer(x, times, mask=mask[:, :, 0, 0]))
    values = np.random.default_rng(2).normal(size=(3, 5, 3)).astype("float32")
    observed = np.random.default_rng(3).uniform(size=(3, 5, 1, 1)) < 0.7
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False, target_spec=BUILTINS)
    inputs = [values, TIMES, observed]
    np.testing.assert_allclose(run_litert(path, inputs), model.predict(inputs, verbose=0), atol=1e-5)


@pytest.mark.parametrize(("layer", "steps"), [("ODERNN", 300), ("NeuralCDE", None)])
@pytest.mark.filterwarnings("ignore")
def test_litert_of_a_long_series_and_of_any(layer, steps, tmp_path):
    keras.utils.set_random_seed(0)
    solver = keras_node.RungeKutta("euler", num_steps=1)
    if layer == "ODERNN":
        layer = keras_node.ODERNN(keras.layers.SimpleRNNCell(4), field(), solver=solver, return_sequences=True)
    else:
        layer = keras_node.NeuralCDE(4, solver=solver, return_sequences=True)
    x, times = keras.Input((steps, 3)), keras.Input((steps,))
    model = keras.Model([x, times], layer(x, times))
    rng = np.random.default_rng(2)
    inputs = [0.03 * rng.normal(size=(2, 300, 3)), np.cumsum(0.01 * rng.uniform(size=(2, 300)), axis=1)]
    inputs = [x.astype("float32") for x in inputs]
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False, target_spec=BUILTINS)
    np.testing.assert_allclose(run_litert(path, inputs), model.predict(inputs, verbose=0), atol=1e-5)


@pytest.mark.parametrize("times", [3, 300])
@pytest.mark.filterwarnings("ignore")
def test_litert_of_several_times(times, tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    ts = np.linspace(0.1, 1.0, times)
    model = keras.Model(x, keras_node.ODELayer(field(), solver=SOLVERS["adaptive"])(x, ts=ts))
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False, target_spec=BUILTINS)
    np.testing.assert_allclose(run_litert(path, [X]), model.predict(X, verbose=0), atol=1e-5)
