"""Learns gravity and restitution from noisy heights of bouncing balls.

A ball falls, and at the ground its velocity changes its sign and loses a part. Nobody tells the model when that
happens: the solve looks for the moment (`keras_node.Event`), and the gradient of every later height goes through it.
Two numbers are trained, the acceleration and the part of the velocity that is left, from 16 balls that were seen for
two seconds. The picture continues to six seconds, where the balls have bounced many times.

    python examples/bouncing_ball.py            # three minutes on one core
    python examples/bouncing_ball.py --quick    # in some seconds
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from keras import ops

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRAVITY, RESTITUTION, NOISE, BALLS = 9.81, 0.85, 0.05, 16
TIMES = np.linspace(0.05, 2.0, 40).tolist()
LONG = np.linspace(0.01, 6.0, 600).tolist()


@keras.saving.register_keras_serializable(package="examples")
class Fall(keras.layers.Layer):
    """The field of a height and a velocity, with a trained acceleration."""

    def build(self, t_shape, y_shape):
        self.gravity = self.add_weight(shape=(), initializer=keras.initializers.Constant(7.0), name="gravity")

    def call(self, t, y):
        return ops.stack([y[:, 1], -self.gravity * ops.ones_like(y[:, 1])], axis=1)


@keras.saving.register_keras_serializable(package="examples")
class Bounce(keras.layers.Layer):
    """The state after the ground, with a trained restitution."""

    def build(self, t_shape, y_shape):
        self.restitution = self.add_weight(shape=(), initializer=keras.initializers.Constant(0.7), name="restitution")

    def call(self, t, y):
        return ops.stack([y[:, 0], -self.restitution * y[:, 1]], axis=1)


@keras.saving.register_keras_serializable(package="examples")
def height(t, y):
    """The event function: a ball is at the ground where its height is zero."""
    return y[:, 0]


def bouncing():
    """Returns the layer that moves balls."""
    ground = keras_node.Event(height, direction=-1, reset=Bounce())
    return keras_node.ODELayer(Fall(), event=ground, max_events=24)


def true_heights(starts, times):
    """The heights in closed form, parabola by parabola."""
    heights = np.zeros((len(starts), len(times)))
    for i, start in enumerate(starts):
        begin, velocity, y0 = 0.0, 0.0, start
        for _ in range(60):
            end = begin + (velocity + np.sqrt(velocity**2 + 2 * GRAVITY * y0)) / GRAVITY
            s = np.array(times) - begin
            now = (s >= 0) & (np.array(times) <= end)
            heights[i, now] = (y0 + velocity * s - GRAVITY * s**2 / 2)[now]
            velocity, y0, begin = RESTITUTION * (GRAVITY * (end - begin) - velocity), 0.0, end
    return heights


class Path(keras.callbacks.Callback):
    """Notes the two numbers after every epoch."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def on_epoch_end(self, epoch, logs=None):
        self.numbers.append([float(v.numpy()) for v in self.model.trainable_variables])


def draw(path, layer, starts, samples, numbers):
    """Draws two balls with their data and what is predicted, and the path of the two numbers."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained", width_ratios=[2, 1])
    inputs = keras.Input((2,))
    states = np.stack([starts[:2], 0 * starts[:2]], axis=1)
    longer = keras.Model(inputs, layer(inputs, ts=LONG)[..., 0])
    longer.compile(jit_compile=True)  # in an XLA program, a ball that bounces too often is NaN and raises nothing
    predicted = longer.predict(states, verbose=0)
    for i, color in enumerate(("tab:blue", "tab:orange")):
        axes[0].plot(TIMES, samples[i], ".", color=color, label=f"ball {i + 1}, seen")
        axes[0].plot(LONG, predicted[i], color=color, lw=1, label="predicted")
        axes[0].plot(LONG, true_heights(starts[i : i + 1], LONG)[0], ":", color="k", lw=1)
    axes[0].axvspan(0, TIMES[-1], color="0.95")
    axes[0].set(title="Heights; the truth is dotted", xlabel="time in seconds", ylabel="metres")
    axes[0].legend(ncols=2, loc="upper right")
    axes[1].plot(*np.array(numbers).T, ".-", color="tab:green", ms=4)
    axes[1].plot(GRAVITY, RESTITUTION, "k+", ms=14, label="true")
    axes[1].set(title="After every epoch", xlabel="gravity", ylabel="restitution")
    axes[1].legend()
    figure.savefig(path, dpi=120)


def experiment(seed, epochs, jit_compile):
    """Learns the two numbers. Returns them after every epoch, the last loss, and what is drawn."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(1.2, 2.5, BALLS)
    samples = true_heights(starts, TIMES) + NOISE * rng.normal(size=(BALLS, len(TIMES)))
    states = np.stack([starts, 0 * starts], axis=1).astype("float32")

    layer = bouncing()
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layer(inputs, ts=TIMES)[..., 0])
    rate = keras.optimizers.schedules.CosineDecay(0.1, epochs)
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=jit_compile)
    path = Path()
    history = model.fit(states, samples, batch_size=BALLS, epochs=epochs, verbose=0, callbacks=[path])
    return path.numbers, history.history["loss"][-1], (layer, starts, samples, [[7.0, 0.7], *path.numbers])


def spread(values, digits):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def main():
    """Runs the experiment with every seed, prints the two numbers and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only, with one seed")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds, and the one of the picture")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bouncing_ball.png"))
    options = parser.parse_args()
    epochs, seeds = (5, 1) if options.quick else (options.epochs, options.seeds)

    began = time.perf_counter()
    runs = [experiment(options.seed + i, epochs, jit_compile=not options.quick) for i in range(seeds)]
    numbers, losses, pictures = zip(*runs, strict=True)
    print(f"{seeds} seed{'s' if seeds > 1 else ''}")
    print(f"{'':14}{'true':>8}{'start':>8}{'learnt':>18}")
    for name, true, start, learnt in zip(
        ("gravity", "restitution"),
        (GRAVITY, RESTITUTION),
        (7.0, 0.7),
        np.transpose([path[-1] for path in numbers]),
        strict=True,
    ):
        print(f"{name:14}{true:8.3f}{start:8.3f}{spread(learnt, 4):>18}")
    print(f"mean squared error {spread(losses, 5)}, of the noise alone {NOISE**2:.5f}")
    print(f"{time.perf_counter() - began:.0f} seconds")
    draw(options.out, *pictures[0])
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
