"""Networks of continuous depth and continuous time on MNIST-1D, beside the published networks.

MNIST-1D (Greydanus & Kobak 2020, arXiv:2011.14439) has ten kinds of short signals that are scaled, shifted, sheared and
buried in correlated noise. The package `mnist1d` generates the 4000 signals for training and 1000 for the test. The
table has the four networks of the paper in the shapes of its code, trained as there (Adam, batches of 100, 6000 steps),
which shows that data and training compare, and two of ours:

- An ODE network: three convolutions with strides, then a continuous part whose field has two convolutions. It is the
  network of `regularized_depth.py`, with its penalty on the local error.
- A neural CDE, which reads the signal as a path in time. As for the GRU of the paper, the head sees its states at all
  times.

What came out, as the mean and the standard deviation over three seeds:

- The networks of the paper have the published accuracies within two of their standard deviations, except the CNN, which
  has 92.6 ± 0.4 % instead of 94 %.
- The ODE network has 94.3 ± 0.9 %, and the neural CDE 95.9 ± 1.0 %, as much as the paper's human reader. Both have
  about three and four times as many weights as the CNN, and dropout, so the comparison is not of networks of one
  size.

The epochs of the neural CDE were checked with `--validate`, which holds out a fifth of the training signals (95.0 %
with two seeds); the ODE network has those of `regularized_depth.py`.

    python examples/mnist_1d.py            # 11 minutes on one core
    python examples/mnist_1d.py --quick    # barely trained, in half a minute
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from keras import layers
from regularized_depth import load, signal_network, spread

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, LENGTH, CLASSES, UNITS = 100, 40, 10, 32
KINDS = ("logistic", "MLP", "GRU", "CNN", "ODE network", "neural CDE")
PUBLISHED = {"logistic": 32, "MLP": 68, "GRU": 91, "CNN": 94, "human": 96}  # in %


# Those of the neural CDE were checked with `--validate`, which holds out a fifth of the training data.
EPOCHS = {"ODE network": 25, "neural CDE": 40}  # the others: 150, as published


def network(kind):
    """Returns a network that computes the logits of the ten classes of signals `(batch, 40)`."""
    if kind == "ODE network":
        return signal_network({"local_error": 0.3})
    signals = keras.Input((LENGTH,))
    y = layers.Reshape((LENGTH, 1))(signals)
    if kind == "logistic":
        y = signals
    elif kind == "MLP":
        y = layers.Dense(100, "relu")(layers.Dense(100, "relu")(signals))
    elif kind == "GRU":
        y = layers.Flatten()(layers.Bidirectional(layers.GRU(6, return_sequences=True))(y))
    elif kind == "CNN":
        for size in (5, 3, 3):
            y = layers.Conv1D(25, size, strides=2, padding="same", activation="relu")(y)
        y = layers.Flatten()(y)
    else:
        field = keras.Sequential([layers.Dense(64, "silu"), layers.Dense(UNITS * 2, "tanh")])
        solver = keras_node.RungeKutta("midpoint", num_steps=1)
        cde = keras_node.NeuralCDE(UNITS, field, solver=solver, gradient="direct", return_sequences=True)
        times = keras.ops.cumsum(keras.ops.ones_like(signals), axis=1)
        y = layers.Dropout(0.2)(layers.Flatten()(cde(y, times)))
    return keras.Model(signals, layers.Dense(CLASSES)(y))


def train(kind, data, epochs, seed):
    """Returns a trained network, its accuracy in %, the evaluations of its solve if it has one, and the seconds."""
    keras.utils.set_random_seed(seed)
    x, x_test, labels, labels_test = data
    model = network(kind)
    batches = tf.data.Dataset.from_tensor_slices((x, labels)).cache().shuffle(len(x)).batch(BATCH, drop_remainder=True)
    if kind in EPOCHS:
        rate = keras.optimizers.schedules.CosineDecay(1e-2, epochs * len(batches))
        optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01)
    else:
        optimizer = keras.optimizers.Adam(1e-2)  # as published
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # A single epoch is over before XLA has compiled it.
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=kind == "neural CDE" and epochs > 1)
    start = time.perf_counter()
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
    seconds = time.perf_counter() - start
    results = model.evaluate(x_test, labels_test, batch_size=len(x_test), verbose=0, return_dict=True)
    return model, 100 * results["accuracy"], results.get("ode_evaluations"), seconds


def draw(path, results, signals, labels):
    """Draws one signal of each class, and the accuracies against the numbers of weights."""
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[3, 4])
    for digit, axes in enumerate(left.subplots(5, 2, sharex=True).flat):
        axes.plot(signals[labels == digit][0], color="0.3", lw=1.2)
        axes.set_ylabel(digit, rotation=0, labelpad=8)
        axes.set_yticks([])
    left.suptitle("One signal of each class")
    axes = right.subplots()
    for kind, (weights, accuracies) in results.items():
        color = "tab:red" if kind in EPOCHS else "tab:blue"
        axes.errorbar(weights, np.mean(accuracies), np.std(accuracies), fmt="o", color=color, capsize=4)
        place = {"va": "bottom", "xytext": (9, 0)} if kind == "CNN" else {"va": "top", "xytext": (9, -2)}
        axes.annotate(kind, (weights, np.mean(accuracies)), textcoords="offset points", **place)
        if kind in PUBLISHED:
            axes.plot(weights, PUBLISHED[kind], "o", mfc="none", mec="tab:blue", ms=9)
    axes.axhline(PUBLISHED["human"], color="0.6", lw=1, ls="--")
    axes.text(350, PUBLISHED["human"] + 0.5, "human", color="0.4")
    axes.plot([], [], "o", mfc="none", mec="tab:blue", ms=9, label="published")
    axes.plot([], [], "o", color="tab:blue", label="the same networks here")
    axes.plot([], [], "o", color="tab:red", label="of continuous depth or time")
    axes.set(xscale="log", xlabel="weights", ylabel="test accuracy, %", xlim=(300, 4e4), ylim=(25, 101))
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    """Trains all networks, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train three of the networks for an epoch")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--validate", action="store_true", help="hold out a fifth of the training data as the test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("mnist_1d.png"))
    options = parser.parse_args()
    seeds = 1 if options.quick else options.seeds
    kinds = [kind for kind in KINDS if not (options.quick and kind in ("MLP", "GRU", "CNN"))]

    data = load("MNIST-1D", options.validate)
    results = {}
    print(f"{seeds} seed{'s' if seeds > 1 else ''}")
    print("network        published, %   test accuracy, %   epochs   weights   evaluations   s/epoch")
    for kind in kinds:
        epochs = 1 if options.quick else EPOCHS.get(kind, 150)
        runs = [train(kind, data, epochs, options.seed + i) for i in range(seeds)]
        models, accuracies, evaluations, seconds = zip(*runs, strict=True)
        results[kind] = weights, accuracies = models[0].count_params(), accuracies
        solves = "" if evaluations[0] is None else f"{np.mean(evaluations):.0f}"
        print(
            f"{kind:14} {PUBLISHED.get(kind, ''):>12} {spread(accuracies):>18} {epochs:8} {weights:9,} {solves:>13} "
            f"{np.median(seconds) / epochs:9.2f}",
            flush=True,
        )
    draw(options.out, results, data[1], data[3])
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
