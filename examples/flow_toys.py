"""Learns densities in the plane from samples, with a continuous normalizing flow.

A flow moves normally distributed noise along an ODE whose field is a network, and computes the density of the result.
The three data sets are those of Grathwohl et al. (2019), "FFJORD", arXiv:1810.01367, which shows pictures but no
numbers:

- eight Gaussians: standard deviation 0.5, means on a circle of radius 4, both divided by sqrt(2): entropy 2.833 nats;
- two moons: arcs with noise of 0.1, times 2;
- checkerboard: uniform on eight squares of side 2: entropy ln 32 = 3.466 nats.

All three densities are known. So we know the least negative log-likelihood (NLL) that a model can have on test points.
The flow comes within 0.01 nats of it on the Gaussians, and within 0.03 on the moons. On the checkerboard, whose sharp
edges a smooth field cannot make, it is 0.28 away after these steps.

    python examples/flow_toys.py            # six minutes on one core
    python examples/flow_toys.py --quick    # eight Gaussians, hardly any training
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from scipy.special import logsumexp

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, EDGE = 256, 4.5
SOLVER = keras_node.RungeKutta("tsit5", rtol=1e-4, atol=1e-4)
QUICK = keras_node.RungeKutta("midpoint", num_steps=4)
ANGLES = np.arange(8) * np.pi / 4
MEANS, DEVIATION = 4 / np.sqrt(2) * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), 0.5 / np.sqrt(2)


def eight_gaussians(rng, n):
    """Draws samples of the mixture."""
    return MEANS[rng.integers(0, 8, n)] + DEVIATION * rng.normal(size=(n, 2))


def moons(angles):
    """Returns the points of the two arcs at these angles, one arc after the other, before scaling."""
    outer = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([outer, [1, 0.5] - outer])


def two_moons(rng, n):
    """Draws samples of the two arcs, with noise."""
    points = moons(rng.uniform(0, np.pi, n))[rng.permutation(2 * n)[:n]]
    return 2 * (points + 0.1 * rng.normal(size=(n, 2))) - [1, 0.2]


def checkerboard(rng, n):
    """Draws samples of the black squares."""
    x = rng.uniform(-2, 2, n)
    y = rng.uniform(0, 1, n) - 2 * rng.integers(0, 2, n) + np.floor(x) % 2
    return 2 * np.stack([x, y], axis=1)


def log_density_of_mixture(x, means, deviation):
    """Returns the log-density of a mixture of equal round Gaussians."""
    squares = np.sum((x[:, None] - means) ** 2, axis=-1)
    return logsumexp(-squares / (2 * deviation**2), axis=1) - np.log(len(means) * 2 * np.pi * deviation**2)


TOYS = {
    "eight Gaussians": (eight_gaussians, lambda x: log_density_of_mixture(x, MEANS, DEVIATION)),
    "two moons": (
        two_moons,
        # The integral over the arcs, by the midpoint rule.
        lambda x: log_density_of_mixture(x, 2 * moons((np.arange(300) + 0.5) * np.pi / 300) - [1, 0.2], 0.2),
    ),
    "checkerboard": (checkerboard, lambda x: np.full(len(x), -np.log(32))),
}


def train(sample, rng, stages, seed, solver, jit_compile):
    """Trains a flow on new samples in every step. Returns it, with its density and samples after every stage."""
    flow = keras_node.ContinuousFlow(2, solver=solver, jit_compile=jit_compile, seed=seed)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, sum(stages))
    flow.compile(keras.optimizers.Adam(rate), jit_compile=jit_compile)
    pictures = []
    for steps in stages:
        flow.fit(sample(rng, steps * BATCH).astype("float32"), batch_size=BATCH, verbose=0)
        pictures.append(picture(flow))
    return flow, pictures


def picture(flow):
    """Returns the density on a grid, and samples."""
    side = np.linspace(-EDGE, EDGE, 120, dtype="float32")
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    return np.exp(flow.predict(grid, batch_size=4800, verbose=0)).reshape(120, 120), flow.sample(2000).numpy()


def draw(path, rows, stages):
    """Draws the data and, for every stage, the density and the samples of the flow."""
    names = [name for name, *_ in rows]
    figure, axes = plt.subplots(
        2 * len(rows), 1 + len(stages), figsize=(2.6 * (1 + len(stages)), 5.4 * len(rows)), layout="constrained"
    )
    window = {"extent": (-EDGE, EDGE) * 2, "origin": "lower", "cmap": "magma"}
    for name, data, pictures in rows:
        upper, lower = axes[2 * names.index(name) : 2 * names.index(name) + 2]
        upper[0].hist2d(*data.T, bins=90, range=[(-EDGE, EDGE)] * 2, cmap="magma", density=True)
        lower[0].scatter(*data[:2000].T, s=1, color="0.2")
        upper[0].set_title(f"{name}: data")
        for i, (density, samples) in enumerate(pictures):
            upper[1 + i].imshow(density, **window)
            lower[1 + i].scatter(*samples.T, s=1, color="tab:blue")
            upper[1 + i].set_title(f"flow, {sum(stages[: i + 1])} steps")
    for axis in axes.flat:
        axis.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=80)


def main():
    """Trains a flow on every data set, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train on the eight Gaussians only, for a few seconds")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flow_toys.png"))
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    steps, solver = (30, QUICK) if options.quick else (options.steps, SOLVER)
    jit_compile = False if options.quick else "auto"  # compiling takes longer than a quick run
    stages = [steps // 30, steps // 10, steps // 4]
    stages.append(steps - sum(stages))

    rows = []
    print("data set          least NLL   NLL of the flow   difference   seconds")
    for name in list(TOYS)[: 1 if options.quick else None]:
        sample, log_density = TOYS[name]
        rng = np.random.default_rng(options.seed)
        start = time.perf_counter()
        flow, pictures = train(sample, rng, stages, options.seed, solver, jit_compile)
        seconds = time.perf_counter() - start
        test = sample(rng, 2000 if options.quick else 20000)
        nll = -np.mean(flow.predict(test.astype("float32"), batch_size=4800, verbose=0))
        least = -np.mean(log_density(test))
        print(f"{name:16} {least:10.3f} {nll:17.3f} {nll - least:12.3f} {seconds:9.0f}", flush=True)
        rows.append((name, test, pictures))
    draw(options.out, rows, stages)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
