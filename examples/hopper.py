"""Predicts the falls of a one-legged robot of which few moments were observed.

The Hopper of MuJoCo falls from 10,000 random poses, and its 14 positions and velocities are recorded at 200 moments of
each fall. The last 2,000 falls are the test. At every moment a network predicts the state from the observations before
it. The two tasks are those of Rubanova et al. (2019, arXiv:1907.03907):

- interpolation: 100 moments, from a random one of each fall. 10, 20, 30 or 50 % of them are observed.
- extrapolation: the same shares of the first 66 of 200 moments are observed, and the error is that of the other 134.

One network learns each task for all shares: in training, every fall shows a share between 10 and 50 %. All networks
have a GRU cell of 32 units:

- ODE-RNN: the hidden state moves between observations.
- RNN, as in the code of the paper: the cell is called at every moment, with zeros and marks if nothing was observed.
- RNN that waits: the cell is called at observations only. Cell and decoder see the time since the last observation.

Beside them stands the error of a prediction that repeats the last observation, or, before the first one, the mean. This
is below the published errors. The ODE-RNN is the best of the networks, but on interpolation not by much: a plain RNN
with good inputs can be strong, so try it too.

The class `Observing` shows how to handle missing values: add marks next to the channels, and do not update the state if
nothing was observed.

    pip install dm-control mujoco==3.17.0
    python examples/hopper.py            # half an hour on one core
    python examples/hopper.py --quick    # half a minute
"""

import argparse
import os
import pathlib
import time
from typing import NamedTuple

import keras
import matplotlib
import numpy as np

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FALL, STEP, CHANNELS, UNITS, BATCH = 200, 0.03, 14, 32, 50
SHARES = (0.1, 0.2, 0.3, 0.5)
KINDS = ("ODE-RNN", "RNN", "RNN that waits")
EPOCHS = 15


class Task(NamedTuple):
    """How many moments a network predicts, how many of them it may observe, and the published errors of ODE-RNN.

    The errors are those of Rubanova et al. (2019), table 3: mean squares times 100, for each share in `SHARES`.
    """

    moments: int
    read: int
    published: tuple


TASKS = {
    "interpolation": Task(100, 100, (1.647, 1.209, 0.986, 0.665)),
    "extrapolation": Task(200, 66, (13.508, 31.950, 15.465, 26.463)),
}


def simulate(count, rng):
    """Simulates positions and velocities, (count, 200, 14), of falls from random poses."""
    os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is rendered
    try:
        from dm_control import suite
    except ImportError:
        raise SystemExit("This example needs the Hopper: pip install dm-control mujoco==3.17.0") from None
    physics = suite.load("hopper", "stand").physics
    falls = np.zeros((count, FALL, CHANNELS), "float32")
    for fall in falls:
        with physics.reset_context():
            physics.data.qpos[:] = [*rng.uniform(0, 0.5, 2), *rng.uniform(-2, 2, 5)]
            physics.data.qvel[:] = rng.uniform(-5, 5, 7)
        for state in fall:
            state[:] = [*physics.data.qpos, *physics.data.qvel]
            physics.step()
    return (falls - falls.min((0, 1))) / falls.max((0, 1))  # scaled as in the code of the paper


def cut(falls, task, rng):
    """Returns as many moments of each fall as the task has, from a random one."""
    starts = rng.integers(0, FALL - task.moments + 1, len(falls))
    return falls[np.arange(len(falls))[:, None], starts[:, None] + np.arange(task.moments)]


def observed(count, task, share, rng):
    """Draws which moments are observed, (count, moments): a share, or one for each path, of those that may be."""
    order = rng.random((count, task.read)).argsort(axis=1)
    seen = order < np.rint(task.read * np.broadcast_to(share, count))[:, None]
    return np.pad(seen, [(0, 0), (0, task.moments - task.read)])


def observed_test(falls, task):
    """Returns the paths of the test, and for each share which of their moments are observed."""
    rng = np.random.default_rng(1)
    paths = cut(falls, task, rng)
    return paths, {share: observed(len(paths), task, share, rng) for share in SHARES}


def hide(paths, seen):
    """Returns values with marks, and times since the last observation, or since the start."""
    marks = np.broadcast_to(seen[..., None], paths.shape)
    values = np.concatenate([np.where(marks, paths, 0), marks], axis=-1).astype("float32")
    moments = np.arange(paths.shape[1])
    last = np.maximum.accumulate(np.where(seen, moments, 0), axis=1)
    before = np.pad(last[:, :-1], [(0, 0), (1, 0)])
    return [values, STEP * (moments - before)[..., None].astype("float32")]


def repeat(paths, seen, mean):
    """Predicts every moment but the first: the last observation before it, or the mean if there is none."""
    last = np.maximum.accumulate(np.where(seen, np.arange(paths.shape[1]), -1), axis=1)[:, :-1, None]
    return np.where(last < 0, mean, np.take_along_axis(paths, np.maximum(last, 0), axis=1))


class Observing(keras.layers.Layer):
    """A GRU cell that updates its state only if something was observed. Its output is the state before the update."""

    def __init__(self, units):
        super().__init__()
        self.cell = keras.layers.GRUCell(units)
        self.state_size = self.output_size = units

    def build(self, shape):
        self.cell.build(shape)

    def call(self, inputs, states):
        seen = keras.ops.any(inputs[:, CHANNELS : 2 * CHANNELS] > 0, axis=-1, keepdims=True)
        _, updated = self.cell(inputs, states)
        return states[0], [keras.ops.where(seen, updated[0], states[0])]


def predictor(kind, task):
    """Returns a model that predicts the state at every moment but the first, from the observations before it."""
    values, waited = keras.Input((task.moments, 2 * CHANNELS)), keras.Input((task.moments, 1))
    cell = Observing(UNITS)
    decoder = keras.Sequential([keras.layers.Dense(100, activation="tanh"), keras.layers.Dense(CHANNELS)])
    if kind == "RNN":
        h = keras.layers.GRU(UNITS, return_sequences=True)(values)
        return keras.Model([values, waited], decoder(h)[:, :-1])
    if kind == "ODE-RNN":
        still = keras.layers.Dense(UNITS, kernel_initializer="zeros")  # so that at first nothing moves
        field = keras.Sequential([keras.layers.Dense(128, activation="tanh"), still])
        times = STEP * keras.ops.cumsum(keras.ops.ones_like(waited[..., 0]), axis=1)
        solver = keras_node.RungeKutta("midpoint", num_steps=1)
        h = keras_node.ODERNN(cell, field, solver=solver, gradient="direct", return_sequences=True)(values, times)
    else:
        h = keras.layers.RNN(cell, return_sequences=True)(keras.ops.concatenate([values, waited], axis=-1))
        h = keras.ops.concatenate([h, waited], axis=-1)
    return keras.Model([values, waited], decoder(h)[:, 1:])


def train(model, falls, task, epochs, seed, jit_compile):
    """Trains the model, with other moments of the falls observed in every epoch."""
    rng = np.random.default_rng(seed)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * (len(falls) // BATCH))
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), "mse", jit_compile=jit_compile)
    for _ in range(epochs):
        paths = cut(falls, task, rng)
        seen = observed(len(paths), task, rng.uniform(min(SHARES), max(SHARES), len(paths)), rng)
        model.fit(hide(paths, seen), paths[:, 1:], BATCH, verbose=0)


def error(prediction, paths, task):
    """Returns the mean square error times 100: of all moments but the first, or of those that are never observed."""
    first = task.read if task.read < task.moments else 1
    return 100 * np.mean((prediction[:, first - 1 :] - paths[:, first:]) ** 2)


def spread(values):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def draw(path, paths, seen, predictions, curves):
    """Draws predictions of four channels of one fall, and the errors against the share that is observed."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[3, 2])
    channels, moments, marks = {"forward": 0, "up": 1, "rotation": 2, "knee": 5}, np.arange(paths.shape[1]), seen[0]
    for axes, (name, channel) in zip(left.subplots(4, 1, sharex=True), channels.items(), strict=True):
        shown = paths[0, :, channel]
        axes.plot(moments, shown, color="0.8", lw=4, label="truth")
        axes.plot(moments[marks], shown[marks], "k.", ms=5, label="observed")
        for kind, prediction in predictions.items():
            axes.plot(moments[1:], prediction[0, :, channel], lw=1.2, label=kind)
        axes.set_ylabel(name)
    axes.set_xlabel("moment")
    left.align_ylabels()
    left.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    panels = right.subplots(len(TASKS), 1, sharex=True)
    for axes, (name, lines) in zip(panels, curves.items(), strict=True):
        for kind, errors in lines.items():
            axes.plot(100 * np.array(SHARES), errors, "o-", label=kind)
        axes.set(title=name, ylabel="100 x test MSE", yscale="log")
    axes.set_xlabel("moments observed, %")
    figure.savefig(path, dpi=120)


def main():
    """Simulates the falls, trains the networks for both tasks, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validate", action="store_true", help="take the last falls for training as the test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("hopper.png"))
    options = parser.parse_args()
    epochs, seeds, count = (1, 1, 250) if options.quick else (options.epochs, options.seeds, 10_000)

    falls, test = np.split(simulate(count, np.random.default_rng(0)), [count * 4 // 5])
    if options.validate:
        falls, test = np.split(falls, [len(falls) * 7 // 8])
    curves, pictures = {}, {}
    print(f"mean square error times 100, {seeds} seed{'s' if seeds > 1 else ''}")
    for task_name, task in TASKS.items():
        paths, seen = observed_test(test, task)
        heads = "".join(f"{f'{share:.0%} observed':>18}" for share in SHARES)
        print(f"{task_name:18}{heads}   weights  s a training")
        lines, drawn = curves.setdefault(task_name, {}), {}
        for kind in KINDS:
            errors, start = [], time.perf_counter()
            for seed in range(seeds):
                keras.utils.set_random_seed(seed)
                model = predictor(kind, task)
                train(model, falls, task, epochs, seed, jit_compile=not options.quick)
                predictions = [model.predict(hide(paths, seen[share]), 500, verbose=0) for share in SHARES]
                errors.append([error(prediction, paths, task) for prediction in predictions])
            lines[kind] = np.mean(errors, axis=0)
            cells = "".join(f"{spread(column):>18}" for column in np.transpose(errors))
            seconds = (time.perf_counter() - start) / seeds
            print(f"  {kind:16}{cells}{model.count_params():10,}{seconds:14.0f}", flush=True)
            drawn[kind] = predictions[1]
        guesses = [error(repeat(paths, seen[share], falls.mean((0, 1))), paths, task) for share in SHARES]
        print(f"  {'last observation':16}{''.join(f'{guess:18.3f}' for guess in guesses)}")
        print(f"  {'ODE-RNN':16}{''.join(f'{value:18.3f}' for value in task.published)}   published", flush=True)
        pictures[task_name] = paths, seen[SHARES[1]], drawn
    draw(options.out, *pictures["interpolation"], curves)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
