"""Fills in and continues the falls of a one-legged robot, of which few moments were observed, with a generative model.

The data and the two tasks are those of `examples/hopper.py`. That example predicts every moment from the moments before
it. Here an encoder reads all observations of a fall, and one latent state at the start must explain every moment (after
Rubanova et al. 2019, arXiv:1907.03907). The encoder is an ODE-RNN, as in the paper. From the latent state, a latent ODE
computes the later states by solving its ODE. It is compared with a variational autoencoder with the same encoder,
decoder and loss, which computes the later states with a GRU cell. The inputs of this cell are the time that passes and
the last decoded values.

One model learns a task for all shares that are observed: in training, every fall shows between 10 and 50 % of its
moments, and the loss compares with all of them. The error of interpolation is that of all 100 moments, also of those
that were observed, as in the paper.

Beside the models stands the error of straight lines between the observations of each fall. At interpolation they are
better than all models, the published ones included: neighbouring moments are 5 milliseconds apart, and hardly anything
bends in the gaps. What a model is needed for is extrapolation, where the last observation is all that a line has.

    pip install dm-control mujoco==3.17.0
    python examples/latent_hopper.py            # 85 minutes on one core
    python examples/latent_hopper.py --quick    # half a minute
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from hopper import CHANNELS, FALL, SHARES, STEP, TASKS, cut, observed, observed_test, simulate, spread
from keras.layers import Dense

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LATENT_DIM, UNITS, ENCODER_UNITS, BATCH, EPOCHS = 15, 100, 60, 50, 60
TIMES = STEP * np.arange(FALL, dtype="float32")
# Rubanova et al. (2019), table 3: the latent ODE with an ODE-RNN as its encoder, mean squares times 100.
PUBLISHED = {
    "interpolation": (0.360, 0.295, 0.300, 0.285),
    "extrapolation": (1.441, 1.400, 1.175, 1.258),
}
KINDS = ("latent ODE", "recurrent")


class Feedback(keras.layers.Layer):
    """A recurrent cell that computes the next latent state from the time that passes and the decoded values."""

    def __init__(self, decoder):
        super().__init__()
        self.cell = keras.layers.GRUCell(LATENT_DIM)
        self.decoder = decoder
        self.state_size = self.output_size = LATENT_DIM

    def build(self, shape):
        self.cell.build((None, CHANNELS + 1))

    def call(self, waits, states):
        decoded = self.decoder(states[0][:, None])[:, 0]  # the decoder takes series
        return self.cell(keras.ops.concatenate([decoded, waits], axis=-1), states)


class Recurrence(keras.layers.Layer):
    """Replaces the ODE: computes the states at later times from a state, with a recurrent cell."""

    t0 = 0.0

    def __init__(self, decoder):
        super().__init__()
        self.rnn = keras.layers.RNN(Feedback(decoder), return_sequences=True)

    def build(self, shape, ts_shape):
        self.rnn.build((None, None, 1))

    def call(self, z0, ts):
        waits = keras.ops.diff(keras.ops.pad(ts, [(0, 0), (1, 0)]))
        return self.rnn(waits[..., None], initial_state=[z0])


def autoencoder(kind):
    """Returns a latent ODE, or the same model with a recurrent network instead of the ODE."""
    field = keras.Sequential([Dense(UNITS, activation="elu"), Dense(UNITS, activation="elu"), Dense(LATENT_DIM)])
    decoder = keras.Sequential([Dense(UNITS, activation="tanh"), Dense(CHANNELS)])
    still = Dense(ENCODER_UNITS, kernel_initializer="zeros")  # so that at first nothing moves
    between = keras.Sequential([Dense(ENCODER_UNITS, activation="tanh"), still])
    step = keras_node.RungeKutta("midpoint", num_steps=1)
    cell = keras.layers.GRUCell(ENCODER_UNITS)
    model = keras_node.LatentODE(
        LATENT_DIM,
        encoder_cell=keras_node.ODERNNCell(cell, between, solver=step, gradient="direct"),
        vector_field=field,
        decoder=decoder,
        noise_scale=0.03,
        solver=keras_node.RungeKutta("tsit5", max_steps=64),
        gradient="direct",
    )
    if kind == "recurrent":
        del model.dynamics
        model.dynamics = Recurrence(decoder)
    return model


def show(paths, seen, most):
    """Returns what the encoder reads: the observations one after the other, padded to the number `most`."""
    first = np.argsort(~seen, axis=1, kind="stable")[:, :most]
    mask = np.take_along_axis(seen, first, axis=1)[..., None]
    values = np.where(mask, np.take_along_axis(paths, first[..., None], axis=1), 0)
    return TIMES[first], values, np.broadcast_to(mask, values.shape)


def whole(paths):
    """Returns all moments, which the loss compares with."""
    return np.tile(TIMES[: paths.shape[1]], (len(paths), 1)), paths, np.ones(paths.shape, bool)


def most_observed(task):
    """Returns the largest number of observations of a fall."""
    return round(task.read * max(SHARES))


def train(model, falls, task, epochs, seed, jit_compile):
    """Trains the model, with other moments of the falls observed in every epoch."""
    rng = np.random.default_rng(seed)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * (len(falls) // BATCH))
    steps = 20 if jit_compile else 1  # a step is short, so Python takes part in some of them only
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), jit_compile=jit_compile, steps_per_execution=steps)
    for _ in range(epochs):
        paths = cut(falls, task, rng)
        seen = observed(len(paths), task, rng.uniform(min(SHARES), max(SHARES), len(paths)), rng)
        model.fit(show(paths, seen, most_observed(task)), whole(paths), BATCH, verbose=0)


def lines(paths, seen):
    """Joins the observations of each channel by straight lines. Before the first and after the last one is level."""
    moments = np.arange(paths.shape[1])
    joined = np.empty_like(paths)
    for fall, path, marks in zip(joined, paths, seen, strict=True):
        for channel in range(CHANNELS):
            fall[:, channel] = np.interp(moments, moments[marks], path[marks, channel])
    return joined


def error(prediction, paths, task):
    """Returns the mean square error times 100: of all moments, or of those after the last that may be observed."""
    first = task.read if task.read < task.moments else 0
    return 100 * np.mean((prediction - paths)[:, first:] ** 2)


def draw(path, pictures):
    """Draws three channels of one fall for each task, as the models fill them in and continue them."""
    channels = {"up": 1, "knee": 5, "speed forward": 7}
    figure, panels = plt.subplots(len(channels), len(pictures), figsize=(13, 7), layout="constrained", sharex="col")
    for column, (name, (paths, seen, predictions)) in zip(panels.T, pictures.items(), strict=True):
        times = TIMES[: paths.shape[1]]
        for axes, (label, channel) in zip(column, channels.items(), strict=True):
            axes.plot(times, paths[0, :, channel], color="0.8", lw=4, label="truth")
            axes.plot(times[seen[0]], paths[0, seen[0], channel], "k.", ms=5, label="observed")
            for kind, prediction in predictions.items():
                axes.plot(times, prediction[0, :, channel], lw=1.3, label=kind)
            axes.set_ylabel(label)
        column[0].set_title(name)
        column[-1].set_xlabel("time")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


def main():
    """Simulates the falls, trains both models for both tasks, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validate", action="store_true", help="take the last falls for training as the test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("latent_hopper.png"))
    options = parser.parse_args()
    epochs, seeds, count = (1, 1, 250) if options.quick else (options.epochs, options.seeds, 10_000)

    falls, test = np.split(simulate(count, np.random.default_rng(0)), [count * 4 // 5])
    if options.validate:
        falls, test = np.split(falls, [len(falls) * 7 // 8])
    pictures = {}
    print(f"mean square error times 100, {seeds} seed{'s' if seeds > 1 else ''}")
    for task_name, task in TASKS.items():
        paths, seen = observed_test(test, task)
        heads = "".join(f"{f'{share:.0%} observed':>18}" for share in SHARES)
        print(f"{task_name:16}{heads}   weights  s a training")
        drawn = {}
        for kind in KINDS:
            errors, start = [], time.perf_counter()
            for seed in range(seeds):
                keras.utils.set_random_seed(seed)
                model = autoencoder(kind)
                train(model, falls, task, epochs, seed, jit_compile=not options.quick)
                shown = [show(paths, marks, most_observed(task)) for marks in seen.values()]
                predictions = [model.extrapolate(series, whole(paths)[0]).numpy() for series in shown]
                errors.append([error(prediction, paths, task) for prediction in predictions])
            drawn[kind] = predictions[1]
            cells = "".join(f"{spread(column):>18}" for column in np.transpose(errors))
            seconds = (time.perf_counter() - start) / seeds
            print(f"  {kind:14}{cells}{model.count_params():10,}{seconds:14.0f}", flush=True)
        guesses = [error(lines(paths, marks), paths, task) for marks in seen.values()]
        print(f"  {'straight lines':14}{''.join(f'{guess:18.3f}' for guess in guesses)}")
        print(
            f"  {'latent ODE':14}{''.join(f'{value:18.3f}' for value in PUBLISHED[task_name])}   published", flush=True
        )
        pictures[task_name] = paths, seen[SHARES[1]], drawn
    draw(options.out, pictures)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
