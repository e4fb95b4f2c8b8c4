"""Compares training with plain `fit` on a CPU, where Keras does not use XLA, and with `compile(jit_compile=True)`.

    python benchmarks/fit.py

The same model is trained in three ways: in a graph without XLA, with only the solves compiled (`jit_compile="auto"`,
the default), and with the whole model compiled. The epochs are timed in turn.
"""

import argparse
import time

import keras
import numpy as np

import keras_node
from keras_node.jit_compile import CompileLater

BATCH, BATCHES, UNITS, MOMENTS = 64, 10, 32, 20
WAYS = {"graph": (False, False), "default": ("auto", False), "whole-model XLA": ("auto", True)}


def field():
    """Returns the vector field of both models."""
    return keras.Sequential([keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(UNITS)])


def layer_model(solver, jit_compile):
    """Returns a model with an `ODELayer` between two dense layers."""
    x = keras.Input((UNITS,))
    layer = keras_node.ODELayer(field(), solver=solver, jit_compile=jit_compile)
    return keras.Model(x, keras.layers.Dense(1)(layer(keras.layers.Dense(UNITS)(x))))


def recurrent_model(solver, jit_compile):
    """Returns an ODE-RNN for irregular times."""
    x, times = keras.Input((MOMENTS, 4)), keras.Input((MOMENTS,))
    layer = keras_node.ODERNN(keras.layers.GRUCell(UNITS), field(), solver=solver, jit_compile=jit_compile)
    return keras.Model([x, times], keras.layers.Dense(1)(layer(x, times)))


def main() -> None:
    """Times the epochs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    count = BATCH * BATCHES
    series = rng.normal(size=(count, MOMENTS, 4)), np.cumsum(rng.uniform(size=(count, MOMENTS)), axis=1)
    data = {
        "ODELayer": (layer_model, rng.normal(size=(count, UNITS)).astype("float32")),
        f"ODERNN, {MOMENTS} moments": (recurrent_model, [a.astype("float32") for a in series]),
    }
    print("| least time of a training step in ms | " + " | ".join(WAYS) + " | default / whole-model XLA |")
    print("| --- | " + "--- | " * (len(WAYS) + 1))
    for name, (make, x) in data.items():
        y = rng.normal(size=(count, 1)).astype("float32")
        for solver in ("tsit5", "bosh3", "rk4"):
            models = []
            for solve, whole in WAYS.values():
                keras.utils.set_random_seed(0)
                model = make(solver, solve)
                model.compile("sgd", "mse", jit_compile=whole)
                # So many steps that the default has begun to compile.
                model.fit(x, y, BATCH, epochs=1 + CompileLater.SOLVES // BATCHES, shuffle=False, verbose=0)
                models.append(model)
            least = [np.inf] * len(models)
            for _ in range(options.rounds):
                for i, model in enumerate(models):
                    start = time.perf_counter()
                    model.fit(x, y, BATCH, shuffle=False, verbose=0)
                    least[i] = min(least[i], 1e3 * (time.perf_counter() - start) / BATCHES)
            times = " | ".join(f"{t:.1f}" for t in least)
            print(f"| {name}, {solver} | {times} | {least[1] / least[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
