"""Fills in the falls of a one-legged robot, of which only half of the moments were observed, with a generative model.

The data are those of `examples/hopper.py`. That example predicts every moment from the moments before it. Here an
encoder reads all observations of a fall, and one latent state at the start of the fall must explain every moment (after
Rubanova et al. 2019, arXiv:1907.03907). From this state, a latent ODE computes the later states by solving its ODE. It
is compared with a variational autoencoder with the same encoder, decoder and loss, which computes the later states with
a GRU cell. The inputs of this cell are the time that passes and the last decoded values.

    pip install dm-control mujoco==3.17.0
    python examples/latent_hopper.py            # two minutes on two cores
    python examples/latent_hopper.py --quick    # half a minute
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from hopper import CHANNELS, MOMENTS, trajectories
from keras.layers import Dense

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LATENT_DIM, UNITS, BATCH = 15, 100, 50
TIMES = np.linspace(0, 3, MOMENTS, dtype="float32")
ELSEWHERE = {"latent ODE": 0.0425, "recurrent": 0.0787}  # results of the code of the paper after 30 epochs


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
        self.rnn.build((None, MOMENTS, 1))

    def call(self, z0, ts):
        waits = keras.ops.diff(keras.ops.pad(ts, [(0, 0), (1, 0)]))
        return self.rnn(waits[..., None], initial_state=[z0])


def autoencoder(kind):
    """Returns a latent ODE, or the same model with a recurrent network instead of the ODE."""
    field = keras.Sequential([Dense(UNITS, activation="elu"), Dense(UNITS, activation="elu"), Dense(LATENT_DIM)])
    decoder = keras.Sequential([Dense(UNITS, activation="tanh"), Dense(CHANNELS)])
    solver = keras_node.RungeKutta("tsit5", max_steps=64)
    model = keras_node.LatentODE(
        LATENT_DIM, units=UNITS, vector_field=field, decoder=decoder, solver=solver, gradient="direct"
    )
    if kind == "recurrent":
        del model.dynamics
        model.dynamics = Recurrence(decoder)
    return model


def hide(paths, rng):
    """Returns the input of the encoder: half of the moments, including the first."""
    order = rng.random((len(paths), MOMENTS - 1)).argsort(axis=1)
    seen = np.pad(order < MOMENTS // 2 - 1, [(0, 0), (1, 0)], constant_values=True)[..., None]
    return whole(paths)[0], np.where(seen, paths, 0), np.broadcast_to(seen, paths.shape)


def whole(paths):
    """Returns all moments, which the loss compares with."""
    return np.tile(TIMES, (len(paths), 1)), paths, np.ones(paths.shape, bool)


def train(model, paths, epochs, seed, jit_compile):
    """Trains the model, with other moments hidden in every epoch."""
    rng = np.random.default_rng(seed)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * len(paths) // BATCH)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), jit_compile=jit_compile)
    for _ in range(epochs):
        model.fit(hide(paths, rng), whole(paths), BATCH, verbose=0)


def draw(path, truth, hidden, predictions):
    """Draws six channels of one fall, as the two models fill them in."""
    figure, panels = plt.subplots(3, 2, figsize=(13, 7), sharex=True, layout="constrained")
    channels = {"forward": 0, "up": 1, "rotation": 2, "knee": 5, "speed forward": 7, "speed up": 8}
    sample, seen = 0, hidden[2][0].all(axis=-1)
    for axes, (name, channel) in zip(panels.flat, channels.items(), strict=True):
        axes.plot(TIMES, truth[sample, :, channel], color="0.8", lw=4, label="truth")
        axes.plot(TIMES[seen], truth[sample, seen, channel], "k.", ms=4, label="observed")
        for kind, prediction in predictions.items():
            axes.plot(TIMES, prediction[sample, :, channel], lw=1.3, label=kind)
        axes.set_ylabel(name)
    figure.supxlabel("time")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


def main():
    """Simulates the falls, trains both models, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("latent_hopper.png"))
    options = parser.parse_args()
    epochs, seeds, count = (1, 1, 100) if options.quick else (options.epochs, options.seeds, 1000)

    paths, test = np.split(trajectories(count, np.random.default_rng(0)), [count * 4 // 5])
    hidden = hide(test, np.random.default_rng(1))
    predictions = {}
    print(f"{'':12}{f'test MSE, {seeds} seed(s)':>22}{'elsewhere':>12}{'weights':>10}{'seconds':>10}")
    for kind in ELSEWHERE:
        errors, start = [], time.perf_counter()
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            model = autoencoder(kind)
            train(model, paths, epochs, seed, jit_compile=not options.quick)
            predictions[kind] = model.predict(hidden, len(test), verbose=0)
            errors.append(np.mean((predictions[kind] - test) ** 2))
        score, seconds = f"{np.mean(errors):.5f} ± {np.std(errors):.5f}", time.perf_counter() - start
        print(f"{kind:12}{score:>22}{ELSEWHERE[kind]:12}{model.count_params():10,}{seconds:10.0f}", flush=True)
    draw(options.out, test, hidden, predictions)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
