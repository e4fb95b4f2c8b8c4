"""A residual network with continuous depth, trained on handwritten digits.

A residual network moves its hidden state in steps, `y = y + f_i(y)`, each with weights of its own.
Let the steps shrink and share one `f`, and the state follows an ODE, `dy/dt = f(y)`: the
network's depth is now the time from 0 to 1, and the solver decides how often to evaluate `f`.

The script trains both kinds on scikit-learn's 8x8 digits, prints them side by side, shows what a
looser or tighter solver does to the trained network, and draws how the hidden state of the test
digits moves from time 0 to 1.

    python examples/digits.py            # about a minute on two cores
    python examples/digits.py --quick    # a few seconds
"""

import argparse
import pathlib
import time

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_node

WIDTH, HIDDEN, BLOCKS = 32, 64, 6


def two_layer_mlp():
    """The residual networks' block, and the ODE's right-hand side."""
    return keras.Sequential(
        [keras.layers.Dense(HIDDEN, activation="tanh"), keras.layers.Dense(WIDTH)]
    )


def residual_network():
    """Stem, six residual blocks, head."""
    inputs = keras.Input((64,))
    y = keras.layers.Dense(WIDTH)(inputs)
    for _ in range(BLOCKS):
        y = y + two_layer_mlp()(y)
    return keras.Model(inputs, keras.layers.Dense(10)(y))


def continuous_network(solver="tsit5"):
    """Stem, one ODE in place of the blocks, head."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(WIDTH),
            keras_node.ODELayer(two_layer_mlp(), solver=solver),
            keras.layers.Dense(10),
        ]
    )


class EpochTimer(keras.callbacks.Callback):
    """Seconds of every epoch."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def train(model, data, epochs):
    """Fit, and return the test accuracy and the median seconds of an epoch."""
    x_train, x_test, labels_train, labels_test = data
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    model.fit(x_train, labels_train, 64, epochs, verbose=0, callbacks=[timer])
    _, accuracy = model.evaluate(x_test, labels_test, verbose=0)
    return accuracy, np.median(timer.seconds[1:])  # the first epoch also traces the graph


def draw(path, ts, trajectories, accuracies, labels):
    """Draw hidden states (samples, times, units) in their two principal components."""
    ends = trajectories[:, -1]
    axes = np.linalg.svd(ends - ends.mean(0), full_matrices=False)[2][:2]
    plane = (trajectories - ends.mean(0)) @ axes.T
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 6.5), width_ratios=[3, 2], layout="constrained"
    )
    for digit, color in enumerate(plt.colormaps["tab10"].colors):
        paths = plane[labels == digit]
        left.plot(*paths[:20].T, color=color, alpha=0.35, lw=0.9)
        left.scatter(*paths[:20, 0].T, s=9, color="0.25", lw=0, zorder=3)
        left.scatter(*paths[:, -1].T, s=22, color=color, ec="white", lw=0.4, zorder=4, label=digit)
    left.scatter([], [], s=9, color="0.25", lw=0, label="start")
    left.legend(title="digit at t = 1", ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    left.set(title="Hidden state of the test digits", xlabel="component 1", ylabel="component 2")
    right.plot(ts, accuracies, color="0.2", lw=2)
    right.set(title="Accuracy of the head, applied at time t", xlabel="time t = depth")
    figure.savefig(path, dpi=130)


def main():
    """Train both networks, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="digits.png")
    options = parser.parse_args()
    epochs = 4 if options.quick else options.epochs

    keras.utils.set_random_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    data = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    _, x_test, _, labels_test = data

    residual, continuous = residual_network(), continuous_network()
    stem, ode, head = continuous.layers
    results = {
        "residual": train(residual, data, epochs),
        "continuous": train(continuous, data, epochs),
    }
    y0 = stem(x_test)
    stats = keras_node.odeint(ode.vector_field, y0, [0.0, 1.0]).stats
    evaluations = {"residual": BLOCKS, "continuous": int(stats.num_evaluations)}
    print(evaluations, results)

    ts = np.linspace(0, 1, 30, dtype="float32")
    trajectories = ode(y0, ts=ts)
    predictions = np.argmax(head(trajectories), -1)
    accuracies = np.mean(predictions == labels_test[:, None], axis=0)
    draw(options.out, ts, np.asarray(trajectories), accuracies, labels_test)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
