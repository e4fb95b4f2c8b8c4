"""Measures the size and latency of exported models, and the differences of their outputs from the Keras model.

    python benchmarks/serving.py

Every format runs on one thread, with one batch of 16, in this process. LiteRT runs without Flex operations. Latencies
are medians.
"""

import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import keras_node

BATCH, STEPS, FEATURES, UNITS = 16, 10, 8, 32
ADAPTIVE = keras_node.RungeKutta("tsit5", rtol=1e-5, atol=1e-7)
FIXED = keras_node.RungeKutta("rk4", num_steps=4)


def field():
    """Returns the vector field of every model."""
    return keras.Sequential([keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(UNITS)])


def continuous(solver):
    """Returns a model with an `ODELayer` between two dense layers."""
    layers = [keras.layers.Dense(UNITS), keras_node.ODELayer(field(), solver=solver), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def recurrent(solver):
    """Returns a model with an `ODERNN` and a dense layer."""
    x, times = keras.Input((STEPS, FEATURES)), keras.Input((STEPS,))
    h = keras_node.ODERNN(keras.layers.GRUCell(UNITS), field(), solver=solver)(x, times)
    return keras.Model([x, times], keras.layers.Dense(10)(h))


def milliseconds(function):
    """Returns the median time of a call."""
    for _ in range(5):
        function()
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def run_keras(model, inputs, folder):
    """Saves a Keras file. Returns the path and a function that computes the outputs."""
    path = folder / "model.keras"
    model.save(path)
    data = inputs[0] if len(inputs) == 1 else inputs
    return path, lambda: model.predict_on_batch(data)


def run_saved_model(model, inputs, folder):
    """Exports a SavedModel. Returns the path and a function that computes the outputs."""
    path = folder / "saved_model"
    model.export(path, verbose=False)
    served, tensors = tf.saved_model.load(path), [tf.constant(x) for x in inputs]
    return path, lambda: served.serve(tensors[0] if len(tensors) == 1 else tensors).numpy()


def run_onnx(model, inputs, folder):
    """Exports to ONNX. Returns the path and a function that computes the outputs."""
    path = folder / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    feed = {node.name: x for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return path, lambda: session.run(None, feed)[0]


def run_litert(model, inputs, folder):
    """Exports to LiteRT. Returns the path and a function that computes the outputs."""
    path = folder / "model.tflite"
    model.export(path, format="litert", verbose=False)
    interpreter = Interpreter(str(path), num_threads=1)
    given = {len(details["shape"]): details["index"] for details in interpreter.get_input_details()}
    for x in inputs:
        interpreter.resize_tensor_input(given[x.ndim], x.shape)
    interpreter.allocate_tensors()
    (result,) = interpreter.get_output_details()

    def call():
        for x in inputs:
            interpreter.set_tensor(given[x.ndim], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return path, call


RUNS = {"Keras": run_keras, "SavedModel": run_saved_model, "ONNX": run_onnx, "LiteRT": run_litert}


def size(path):
    """Returns the size of a file, or of all files in a folder, in bytes."""
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def main():
    """Measures and prints the table."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    rng = np.random.default_rng(0)
    state = [rng.normal(size=(BATCH, FEATURES)).astype("float32")]
    times = np.cumsum(rng.uniform(size=(BATCH, STEPS)), axis=1).astype("float32")
    series = [rng.normal(size=(BATCH, STEPS, FEATURES)).astype("float32"), times]
    keras.utils.set_random_seed(0)
    cases = {
        "ODELayer, tsit5 adaptive": (continuous(ADAPTIVE), state),
        "ODELayer, rk4 x 4": (continuous(FIXED), state),
        "ODERNN, tsit5 adaptive": (recurrent(ADAPTIVE), series),
        "ODERNN, rk4 x 4": (recurrent(FIXED), series),
    }
    print("| model | format | size, KiB | latency, ms | largest difference |\n| --- | --- | --- | --- | --- |")
    for case, (model, inputs) in cases.items():
        expected = model.predict_on_batch(inputs[0] if len(inputs) == 1 else inputs)
        for name, run in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                path, call = run(model, inputs, pathlib.Path(folder))
                difference = np.max(np.abs(call() - expected))
                row = f"{size(path) / 1024:.0f} | {milliseconds(call):.2f} | {difference:.0e}"
                print(f"| {case} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
