"""Compares a step of `fit` of a convolutional ODE block with that of a residual network of as many convolutions.

    python benchmarks/convolutions.py

The ODE block takes constant steps of rk4, so it evaluates its field as often as there are residual blocks. The adjoint
method evaluates it as often again in its backward solve, and replaying checkpoints does too. The networks take turns.
"""

import argparse
import time

import keras
import numpy as np

import keras_node

BATCH, BATCHES, SIZE, CHANNELS, STEPS = 32, 8, 16, 32, 2
EVALUATIONS = 4 * STEPS


class Residual(keras.layers.Layer):
    """`x + f(x)`."""

    def __init__(self, block: keras.Layer) -> None:
        super().__init__()
        self.block = block

    def call(self, x):
        return x + self.block(x)


def block():
    """Returns two convolutions that keep the shape."""
    first = keras.layers.Conv2D(CHANNELS, 3, padding="same", activation="relu")
    return keras.Sequential([first, keras.layers.Conv2D(CHANNELS, 3, padding="same")])


def continuous(gradient):
    """Returns the block as a vector field, integrated with as many evaluations as there are residual blocks."""
    return [keras_node.ODELayer(block(), solver=keras_node.RungeKutta("rk4", num_steps=STEPS), gradient=gradient)]


def main() -> None:
    """Times the epochs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * BATCHES, SIZE, SIZE, CHANNELS)).astype("float32")
    y = rng.integers(10, size=len(x))
    layers = {
        "residual network": ([Residual(block()) for _ in range(EVALUATIONS)], EVALUATIONS),
        "backsolve (the default)": (continuous("backsolve"), 2 * EVALUATIONS),
        "checkpointed": (continuous("checkpointed"), 2 * EVALUATIONS),
        "direct": (continuous("direct"), EVALUATIONS),
    }
    models = {}
    for name, (inner, _) in layers.items():
        head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
        models[name] = keras.Sequential([keras.Input(x.shape[1:]), *inner, *head])
        models[name].compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        models[name].fit(x, y, BATCH, verbose=0)
    least = dict.fromkeys(models, np.inf)
    for _ in range(options.rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model.fit(x, y, BATCH, verbose=0)
            least[name] = min(least[name], 1e3 * (time.perf_counter() - start) / BATCHES)
    print("| | least time of a training step in ms | beside the residual network | evaluations of the block |")
    print("| --- | --- | --- | --- |")
    for name, (_, evaluations) in layers.items():
        ratio = least[name] / least["residual network"]
        print(f"| {name} | {least[name]:.1f} | {ratio:.2f} | {evaluations} |")


if __name__ == "__main__":
    main()
