"""A residual network with continuous depth, trained on handwritten digits.

A residual network moves its hidden state in steps, `y = y + f_i(y)`, each with weights of its own.
Let the steps shrink and share one `f`, and the state follows an ODE, `dy/dt = f(y)`. Depth is now
the time from 0 to 1, and the solver decides how often to evaluate `f`.

The script trains both networks on scikit-learn's 8x8 digits and prints them side by side, shows
what a looser or a tighter solver does to the trained network, and draws how the hidden state of
the test digits moves.

    python examples/digits.py            # well under two minutes on two cores
    python examples/digits.py --quick    # barely trained, in a few seconds
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, BLOCKS = 64, 6


def two_layer_mlp():
    """One block of the residual network, or the right-hand side of the ODE."""
    return keras.Sequential([keras.layers.Dense(WIDTH, activation="tanh"), keras.layers.Dense(WIDTH)])


def residual_network():
    """Stem, six residual blocks, head."""
    inputs = keras.Input((64,))
    y = keras.layers.Dense(WIDTH)(inputs)
    for _ in range(BLOCKS):
        y = y + two_layer_mlp()(y)
    return keras.Model(inputs, keras.layers.Dense(10)(y))


def continuous_network():
    """Stem, one ODE in place of the blocks, head."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(WIDTH),
            keras_node.ODELayer(two_layer_mlp(), t0=0.0, t1=1.0, track_stats=True, name="ode"),
            keras.layers.Dense(10),
        ]
    )


class EpochTimer(keras.callbacks.Callback):
    """Notes the seconds of every epoch."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def train(model, data, epochs):
    """Fit; return the test accuracy, the median seconds of an epoch and the history."""
    x_train, x_test, labels_train, labels_test = data
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    history = model.fit(x_train, labels_train, 64, epochs, verbose=0, callbacks=[timer])
    accuracy = model.evaluate(x_test, labels_test, verbose=0, return_dict=True)["accuracy"]
    return accuracy, np.median(timer.seconds[1:]), history  # the first epoch compiles, too


def draw(path, ts, states, accuracies, labels, history):
    """Draw hidden states (samples, times, units) in the principal components of the last ones."""
    center = states[:, -1].mean(axis=0)
    components = np.linalg.svd(states[:, -1] - center, full_matrices=False)[2][:2]
    plane = (states - center) @ components.T

    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([["left", "right"], ["left", "below"]], width_ratios=[3, 2])
    left, right, below = axes.values()
    for digit, color in enumerate(plt.colormaps["tab10"].colors):
        paths = plane[labels == digit][:25]
        left.plot(*paths.T, color=color, alpha=0.4, lw=0.9)
        left.scatter(*paths[:, 0].T, s=8, color="0.2", lw=0, zorder=3)
        left.scatter(*paths[:, -1].T, s=26, color=color, ec="white", lw=0.4, zorder=4, label=digit)
    left.scatter([], [], s=8, color="0.2", lw=0, label="start")
    left.legend(title="end, by digit", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    left.set(xlabel="first principal component", ylabel="second principal component")
    left.set_title("Hidden state of test digits, from t = 0 to t = 1")
    right.plot(ts, 100 * accuracies, color="0.2", lw=2)
    right.set(xlabel="time t (depth)", ylabel="test accuracy, %", xlim=(0, 1), ylim=(None, 100))
    right.set_title("What the head would read at time t")
    right.grid(alpha=0.3)
    keras_node.plots.evaluations(history, ax=below)
    below.set_title("What a solve costs as the network learns")
    figure.savefig(path, dpi=120)


def main():
    """Train both networks, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="barely train: a few seconds")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="float32", help="float32, mixed_float16 or mixed_bfloat16")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("digits.png"))
    options = parser.parse_args()
    epochs = 2 if options.quick else options.epochs

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    data = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    _, x_test, _, labels_test = data

    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(options.policy)
    residual, continuous = residual_network(), continuous_network()
    stem, ode, head = continuous.layers
    rows = [("residual", residual, *train(residual, data, epochs))]
    rows += [("continuous", continuous, *train(continuous, data, epochs))]

    y0 = stem(x_test)
    solution = keras_node.odeint(ode.vector_field, y0, [0.0, 1.0])
    evaluations = {"residual": BLOCKS, "continuous": int(solution.stats.num_evaluations)}
    print("network      test accuracy   parameters   s/epoch   evaluations of f")
    for name, model, accuracy, seconds, _ in rows:
        size = model.count_params()
        print(f"{name:12} {accuracy:13.1%} {size:12,} {seconds:9.3f} {evaluations[name]:18}")

    print("\nthe same trained network under other solver tolerances")
    print("rtol         test accuracy   evaluations of f")
    for rtol in (1e-1, 1e-3, 1e-5):
        solver = keras_node.RungeKutta("tsit5", rtol=rtol, atol=1e-3 * rtol)
        solution = keras_node.odeint(ode.vector_field, y0, [0.0, 1.0], solver=solver)
        accuracy = np.mean(np.argmax(head(solution.ys[-1]), axis=-1) == labels_test)
        print(f"{rtol:<12.0e} {accuracy:13.1%} {int(solution.stats.num_evaluations):18}")

    ts = np.linspace(0, 1, 30, dtype="float32")
    states = ode(y0, ts=ts)
    accuracies = np.mean(np.argmax(head(states), axis=-1) == labels_test[:, None], axis=0)
    draw(options.out, ts, np.asarray(states, "float32"), accuracies, labels_test, rows[1][-1])
    print(f"\npicture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
