"""A SavedModel is served and fine-tuned in a process that has TensorFlow, and neither Keras nor this package."""

import json
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_node

SCRIPT = """
import json, sys
sys.modules["keras_node"] = sys.modules["keras"] = None
import numpy as np, tensorflow as tf

for name in json.loads(sys.argv[1]):
    served = tf.saved_model.load(name)
    data = np.load(f"{name}/inputs.npz")
    inputs = [tf.constant(data[key]) for key in sorted(data)]
    serve = lambda inputs: served.serve(inputs[0] if len(inputs) == 1 else inputs)
    with tf.GradientTape() as tape:
        y = serve(inputs)
        loss = tf.reduce_sum(y**2)
    gradients = tape.gradient(loss, served.trainable_variables)
    signature = served.signatures["serving_default"]
    names = sorted(signature.structured_input_signature[1])
    (signed,) = signature(**{n: x[:2] for n, x in zip(names, inputs)}).values()
    for variable, gradient in zip(served.trainable_variables, gradients):
        variable.assign_sub(1e-3 * gradient)
    after = tf.reduce_sum(serve(inputs) ** 2)
    np.savez(f"{name}/results.npz", *gradients, y=y, signed=signed, loss=loss, after=after)
"""


SOLVER = keras_node.RungeKutta("bosh3", rtol=1e-5, atol=1e-6)


def field():
    return keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)])


def continuous():
    layer = keras_node.ODELayer(field(), solver=SOLVER)
    return keras.Sequential([keras.Input((4,), name="a"), layer, keras.layers.Dense(2)])


def recurrent():
    x, times = keras.Input((3, 3), name="a"), keras.Input((3,), name="b")
    layer = keras_node.ODERNN(keras.layers.GRUCell(4), field(), solver=SOLVER)
    return keras.Model([x, times], layer(x, times))


def test_models_are_served_and_fine_tuned_without_keras(tmp_path):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    state = [rng.normal(size=(7, 4)).astype("float32")]
    series = [rng.normal(size=(7, 3, 3)), np.cumsum(rng.uniform(size=(7, 3)), axis=1)]
    series = [a.astype("float32") for a in series]
    models = {
        "continuous": (continuous(), state),
        "recurrent": (recurrent(), series),
    }
    for name, (model, inputs) in models.items():
        model.export(tmp_path / name, verbose=False)
        np.savez(tmp_path / name / "inputs.npz", **dict(zip("ab", inputs, strict=False)))
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(models))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    for name, (model, inputs) in models.items():
        results = np.load(tmp_path / name / "results.npz")
        with tf.GradientTape() as tape:
            y = model(inputs[0] if len(inputs) == 1 else inputs)
            loss = tf.reduce_sum(y**2)
        np.testing.assert_allclose(results["y"], y, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(results["signed"], y[:2], atol=1e-5, err_msg=name)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        for i, gradient in enumerate(gradients):
            loaded = results[f"arr_{i}"]
            np.testing.assert_allclose(loaded, gradient, rtol=1e-4, atol=1e-5 * np.max(np.abs(gradient)), err_msg=name)
        assert results["after"] < results["loss"]
