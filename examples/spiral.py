"""Learns the dynamics of a two-dimensional spiral from samples of one trajectory.

The true dynamics are `dy/dt = A y^3`, started at (2, 0) and sampled 1000 times up to t = 25 (after Chen et al. 2018,
"Neural Ordinary Differential Equations", arXiv:1806.07366, and the demo of its authors). A small network replaces the
right-hand side. It never sees a rate of change: it is trained so that a solve of the ODE from one sample passes through
later samples.

    python examples/spiral.py            # less than two minutes on two cores
    python examples/spiral.py --quick    # hardly any training, in a few seconds
"""

import argparse
import pathlib

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

A = np.array([[-0.1, 2.0], [-2.0, -0.1]])
START = np.array([[2.0, 0.0]])  # a batch of one
WINDOW = slice(0, 50, 5)  # one piece of the trajectory: 10 samples over 1.1 units of time
BATCH = 128
# The learnt field compensates for errors of the solver, so the tolerances are tighter than the default.
TRAINING = keras_node.RungeKutta("tsit5", rtol=1e-4, atol=1e-6)
QUICK = keras_node.RungeKutta("midpoint", num_steps=1)
ACCURATE = keras_node.RungeKutta("dopri5", rtol=1e-6, atol=1e-7)


def true_field(y):
    """Returns the rate of change that the network has to find."""
    return keras.ops.matmul(y**3, A.T)


@tf.function  # a solve of many steps is much faster in a graph
def trajectory(field, start, times):
    """Returns the states at `times` on the path from `start`."""
    return keras_node.odeint(field, start, times, solver=ACCURATE).ys[:, 0]


def network():
    """Returns a network that computes the rate of change."""
    return keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(64, activation="gelu"),
            keras.layers.Dense(64, activation="gelu"),
            keras.layers.Dense(2),
        ]
    )


def train(field, times, samples, epochs, solver, jit_compile):
    """Trains the field in a model that maps the first state of a window to all its states."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW.stop, axis=0)
    windows = windows.swapaxes(1, 2)[:, WINDOW].astype("float32")  # (windows, times, 2)
    start = keras.Input((2,))
    states = keras_node.ODELayer(field, solver=solver, jit_compile=jit_compile)(
        start, ts=times[WINDOW].astype("float32")
    )
    model = keras.Model(start, states)

    rate = keras.optimizers.schedules.CosineDecay(3e-2, epochs * len(windows) // BATCH)
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=jit_compile)
    report = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch % 20 or print(f"epoch {epoch:3}: loss {logs['loss']:.6f}", flush=True)
    )
    model.fit(windows[:, 0], windows, BATCH, epochs, verbose=0, callbacks=[report])


def draw(path, field, times, true, learnt):
    """Draws the learnt field with both trajectories, both trajectories against time, and the steps of the solver."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplot_mosaic([["left", "right"], ["left", "below"]], width_ratios=[1, 1.2], height_ratios=[2, 1])
    left, right, below = axes.values()
    keras_node.plots.phase_portrait(field, (-2.2, 2.2), (-2.2, 2.2), num_arrows=24, ax=left)
    left.plot(*true.T, color="tab:blue", lw=3, alpha=0.5, label="true")
    left.plot(*learnt.T, color="k", lw=1.2, ls="--", label="learnt")
    left.plot(*START.T, "o", color="tab:blue", label="start")
    left.set(aspect="equal", title="Learnt vector field, brighter where it is faster")
    left.legend(loc="upper right", framealpha=1)
    for i, color in enumerate(("tab:blue", "tab:orange")):
        right.plot(times, true[:, i], color=color, lw=3, alpha=0.5, label=f"true $y_{i + 1}$")
        right.plot(times, learnt[:, i], color="k", lw=1.2, ls="--", label="learnt" if i else None)
    right.set(xlabel="time t", title="One solve from the start to t = 25")
    right.legend(loc="upper right")
    keras_node.plots.step_sizes(field, START.astype("float32"), times[[0, -1]], solver=ACCURATE, ax=below)
    below.set_title("The steps of this solve")
    figure.savefig(path, dpi=120)


def main():
    """Samples the truth, trains the network, compares one long solve and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("spiral.png"))
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)

    times = np.linspace(0.0, 25.0, 1000)
    true = trajectory(true_field, START, times).numpy()

    field = network()
    jit_compile = False if options.quick else "auto"  # compiling takes longer than a quick run
    epochs, solver = (5, QUICK) if options.quick else (options.epochs, TRAINING)
    train(field, times, true, epochs, solver, jit_compile)

    learnt = trajectory(field, START.astype("float32"), times.astype("float32")).numpy()
    distance = np.linalg.norm(learnt - true, axis=-1)
    print(f"distance of the learnt trajectory from the true one: mean {distance.mean():.3f}, max {distance.max():.3f}")
    draw(options.out, field, times, true, learnt)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
