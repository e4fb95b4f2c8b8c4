"""Learns a pendulum from noisy trajectories, with and without the knowledge that it conserves an energy.

Two networks of the same size learn how the angle and the momentum of a frictionless pendulum change, from short noisy
trajectories. One network returns the rates of change directly. The other returns one number, the energy, and Hamilton's
equations turn it into the rates of change (`keras_node.HamiltonianField`; after Greydanus et al. 2019,
arXiv:1906.01563). Both are then solved for a far longer time than that of the training trajectories. The true energy of
the solution shows how far they drift.

    python examples/pendulum.py            # three minutes on one core
    python examples/pendulum.py --quick    # hardly any training, in a few seconds
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAJECTORIES, NOISE, WINDOW, BATCH = 50, 0.1, 11, 100
LONG = np.linspace(0.0, 100.0, 501)  # sixteen small swings
TIMES = LONG[:21].astype("float32")  # two thirds of a swing
ELSEWHERE = {"Hamiltonian": 2.4852e-2, "plain": 4.1519e-2}  # mean squared error of the energy
ACCURATE = keras_node.RungeKutta("dopri5", rtol=1e-6, atol=1e-7)


def energy(y):
    """Returns the true energy of a pendulum with length, mass and gravity 1: 0 if it hangs at rest, 2 if upright."""
    q, p = keras.ops.split(y, 2, axis=-1)
    return p**2 / 2 + 1 - keras.ops.cos(q)


def starts(number, rng):
    """Returns random states at rest, with energies from 0.2 to 1.6. From 2 on, a pendulum would turn over."""
    angle = np.arccos(1 - rng.uniform(0.2, 1.6, (number, 1)))
    return np.concatenate([angle * rng.choice([-1, 1], (number, 1)), np.zeros((number, 1))], axis=-1)


@tf.function
def trajectories(field, start, times):
    """Returns the paths from all starts, `(batch, times, 2)`."""
    return keras.ops.moveaxis(keras_node.odeint(field, start, times, solver=ACCURATE).ys, 0, 1)


def network(outputs):
    """Returns a network whose input is the state."""
    return keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(outputs),
        ]
    )


def train(field, samples, epochs, jit_compile):
    """Trains a field so that a solve from one noisy sample passes close to the next ones."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW, axis=1)  # (trajectories, starts, 2, WINDOW)
    windows = windows.reshape(-1, 2, WINDOW).swapaxes(1, 2).astype("float32")
    start = keras.Input((2,))
    solver = keras_node.RungeKutta("rk4", num_steps=1)
    states = keras_node.ODELayer(field, solver=solver, jit_compile=jit_compile)(start, ts=TIMES[:WINDOW])
    model = keras.Model(start, states)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, epochs * len(windows) // BATCH)
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=jit_compile)
    model.fit(windows[:, 0], windows, BATCH, epochs, verbose=0)


def drift(paths):
    """Returns the largest deviation of the true energy from its initial value, averaged over all trajectories."""
    energies = energy(paths)[..., 0]
    return float(np.mean(np.max(np.abs(energies - energies[:, :1]), axis=1)))


def draw(path, samples, paths):
    """Draws the trajectories in the phase plane with the data, and the energy against time."""
    figure, axes = plt.subplots(1, len(paths), figsize=(15, 4.8), layout="constrained")
    for axis, name in zip(axes, ("Hamiltonian", "plain"), strict=False):
        axis.plot(*samples.reshape(-1, 2).T, ".", ms=2, color="0.85", zorder=0)
        for y in paths["true"][:4]:
            axis.plot(*y[:50].T, color="tab:blue", lw=4, alpha=0.3)
        for y in paths[name][:4]:
            axis.plot(*y.T, color="k", lw=0.5)
        axis.set(title=f"{name}: 16 swings, the true path in blue", xlabel="angle", ylabel="momentum")
        axis.set(xlim=(-3, 3), ylim=(-2.5, 2.5), aspect="equal")
    for (name, all_paths), color in zip(paths.items(), ("tab:blue", "tab:green", "tab:red"), strict=True):
        for i, y in enumerate(all_paths[:4]):
            axes[-1].plot(LONG, energy(y), color=color, lw=3 if name == "true" else 1, label=None if i else name)
    axes[-1].set(title="True energy of the trajectories", xlabel="time", ylim=(0, 2.2))
    axes[-1].legend(loc="upper right")
    figure.savefig(path, dpi=120)


def experiment(seed, epochs, jit_compile):
    """Trains both networks on the same samples. Returns the samples and the paths of all fields from other starts."""
    rng = np.random.default_rng(seed)
    truth = keras_node.HamiltonianField(energy, dtype="float64")
    true = trajectories(truth, starts(TRAJECTORIES + 20, rng), LONG).numpy()
    samples = true[:TRAJECTORIES, : len(TIMES)]
    samples += NOISE * rng.normal(size=samples.shape)

    keras.utils.set_random_seed(seed)
    fields = {"Hamiltonian": keras_node.HamiltonianField(network(1)), "plain": network(2)}
    paths = {"true": true[TRAJECTORIES:]}
    for name, field in fields.items():
        train(field, samples, epochs, jit_compile)
        paths[name] = trajectories(field, paths["true"][:, 0].astype("float32"), LONG.astype("float32")).numpy()
    return samples, paths


def errors(y, true):
    """Returns the error of paths for a while, the drift of their energy for a while and to the end, and its error."""
    error = np.sqrt(np.mean((y - true)[:, LONG < 4] ** 2))
    mse = np.mean((energy(y.astype("float64")) - energy(true)) ** 2)
    return error, drift(y[:, LONG < 10]), drift(y), mse


def spread(values):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def main():
    """Runs the experiment with every seed, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only, with one seed")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds, and the one of the picture")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("pendulum.png"))
    options = parser.parse_args()
    # Compiling takes longer than a quick run.
    epochs, seeds, jit_compile = (3, 1, False) if options.quick else (options.epochs, options.seeds, True)

    began = time.perf_counter()
    runs = [experiment(options.seed + i, epochs, jit_compile) for i in range(seeds)]
    print(f"{seeds} seed{'s' if seeds > 1 else ''}")
    heads = ("error, t < 4", "drift, t < 10", "drift, t < 100", "energy MSE")
    print(f"{'field':12}{''.join(f'{head:>18}' for head in heads)}  elsewhere")
    for name in runs[0][1]:
        results = np.transpose([errors(paths[name], paths["true"]) for _, paths in runs])
        cells = "".join(f"{spread(values):>18}" for values in results)
        print(f"{name:12}{cells}{ELSEWHERE.get(name, 0):11.5f}")
    print("elsewhere: Greydanus et al. (2019), for a stronger pendulum that is learnt from noisy rates of change")
    print(f"{time.perf_counter() - began:.0f} seconds")
    draw(options.out, *runs[0])
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
