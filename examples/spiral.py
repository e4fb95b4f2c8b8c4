"""Learn the dynamics of a two-dimensional spiral from samples of one trajectory.

The truth is `dy/dt = A y^3`, started at (2, 0) and sampled 1000 times up to t = 25 (Chen et al.
2018, "Neural Ordinary Differential Equations", section 5 and the authors' demo). A small network
takes the place of the right-hand side. It never sees a rate of change: it is trained so that
solving the ODE from one sample passes through the samples that follow.

    python examples/spiral.py            # under two minutes on two cores
    python examples/spiral.py --quick    # barely trained, in a few seconds
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
WINDOW = 16  # samples in one piece of the trajectory
ACCURATE = keras_node.RungeKutta("dopri5", rtol=1e-6, atol=1e-7)


def true_field(y):
    """The rate of change that the network has to find."""
    return keras.ops.matmul(y**3, A.T)


@keras.saving.register_keras_serializable(package="spiral")
class Cube(keras.layers.Layer):
    """`y^3`: as in the authors' demo, the network knows this much of the truth."""

    def call(self, y):
        """Cube every component."""
        return y**3


@tf.function  # a solve of many steps is much faster in a graph
def trajectory(field, start, times):
    """The path from `start` through all `times`."""
    return keras_node.odeint(field, start, times, solver=ACCURATE).ys[:, 0]


def learnt_field():
    """The network that stands for the rate of change."""
    return keras.Sequential(
        [
            keras.Input((2,)),
            Cube(),
            keras.layers.Dense(50, activation="tanh"),
            keras.layers.Dense(2),
        ]
    )


def draw(path, field, times, true, learnt):
    """Draw the learnt field and both trajectories in the plane, and beside it over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), width_ratios=[1, 1.2], layout="constrained")
    grid = np.linspace(-2.3, 2.3, 24)
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2).astype("float32")
    rates = np.asarray(field(points)).reshape(24, 24, 2)
    speed = np.log10(np.linalg.norm(rates, axis=-1))
    left.streamplot(grid, grid, *rates.T.swapaxes(1, 2), color=speed, cmap="Greys")
    left.plot(*true.T, color="tab:blue", lw=2.5, label="true")
    left.plot(*learnt.T, color="tab:orange", lw=1.5, ls="--", label="learnt")
    left.plot(*START.T, "o", color="tab:blue")
    left.set(title="Learnt vector field", xlabel="$y_1$", ylabel="$y_2$", aspect="equal")
    for i, color in enumerate(("tab:blue", "tab:green")):
        right.plot(times, true[:, i], color=color, lw=2.5, alpha=0.5, label=f"$y_{i + 1}$ true")
        right.plot(times, learnt[:, i], color="k", lw=1, ls="--")
    right.set(title="One solve from the start, over time", xlabel="time t")
    left.legend(loc="upper right")
    right.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main():
    """Sample the truth, train the field, compare one long solve, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="barely train: a few seconds")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("spiral.png"))
    options = parser.parse_args()
    epochs = 2 if options.quick else options.epochs
    keras.utils.set_random_seed(options.seed)

    times = np.linspace(0, 25, 1000)
    true = trajectory(true_field, START, times).numpy()
    pieces = np.lib.stride_tricks.sliding_window_view(true, WINDOW, axis=0).swapaxes(1, 2)
    pieces = pieces.astype("float32")  # (pieces, WINDOW, 2)

    field = learnt_field()
    start = keras.Input((2,))
    model = keras.Model(start, keras_node.ODELayer(field)(start, ts=times[:WINDOW].astype("float32")))
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, epochs * len(pieces) // 16)
    model.compile(keras.optimizers.Adam(schedule), "mae")
    model.fit(pieces[:, 0], pieces, 16, epochs, verbose=2)

    learnt = trajectory(field, START.astype("float32"), times.astype("float32")).numpy()
    error = np.linalg.norm(learnt - true, axis=-1)
    print(f"distance of the learnt trajectory: mean {error.mean():.4f}, largest {error.max():.4f}")
    draw(options.out, field, times, true, learnt)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
