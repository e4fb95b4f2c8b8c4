"""Learns stiff chemical reactions from concentrations alone.

Robertson's three substances react on time scales from microseconds to days. A small network of the concentrations
returns their rates of change. It is trained so that the solve from the start passes through 50 points, from 0.00001 to
100,000 seconds. The network, the scaling of its output and the loss are those of Kim et al. (2021), "Stiff neural
ordinary differential equations", arXiv:2103.15341; here the learning rate falls to zero. Then 20 substances of an air
pollution model are learnt in the same way.

The data come from an implicit method: an explicit one would need about 70 million steps. The learnt field is less
stiff than the true one, because the loss forgives small errors of fast reactions. So an explicit method can learn it
too, if its gradient is that of the discrete solution, but it did so with one seed of three only. The adjoint method,
which solves backward in time, fails on the way.

    python examples/robertson.py            # 17 minutes on one core
    python examples/robertson.py --quick    # hardly any training, in seconds
"""

import argparse
import pathlib
import time
from typing import NamedTuple

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Reactions: the rate constant, the substances that react, and those that they become, counted from 1.
ROBERTSON = [(0.04, [1], [2]), (3e7, [2, 2], [2, 3]), (1e4, [2, 3], [1, 3])]
# Verwer (1994), "Gauss-Seidel iteration for stiff ODEs from chemical kinetics", SIAM J. Sci. Comput. 15(5).
POLLUTION = [
    (0.35, [1], [2, 3]), (26.6, [2, 4], [1]), (1.23e4, [5, 2], [1, 6]), (8.6e-4, [7], [5, 5, 8]),
    (8.2e-4, [7], [8]), (1.5e4, [7, 6], [5, 8]), (1.3e-4, [9], [5, 8, 10]), (2.4e4, [9, 6], [11]),
    (1.65e4, [11, 2], [1, 10, 12]), (9e3, [11, 1], [13]), (0.022, [13], [1, 11]), (1.2e4, [10, 2], [1, 14]),
    (1.88, [14], [5, 7]), (1.63e4, [1, 6], [15]), (4.8e6, [3], [4]), (3.5e-4, [4], [16]), (0.0175, [4], [3]),
    (1e8, [16], [6, 6]), (4.44e11, [16], [3]), (1.24e3, [17, 6], [5, 18]), (2.1, [19], [2]), (5.78, [19], [1, 3]),
    (0.0474, [1, 4], [19]), (1.78e3, [19, 1], [20]), (3.12, [20], [1, 19]),
]  # fmt: skip
UPDATES = 1000  # in an epoch


class Problem(NamedTuple):
    """Reactions to learn, the data and the network, and the loss that Kim et al. reached."""

    reactions: list
    start: np.ndarray
    times: np.ndarray
    widths: list
    epochs: int
    published: str


PROBLEMS = {
    "Robertson": Problem(
        ROBERTSON, np.eye(3)[0], np.append(0.0, np.logspace(-5, 5, 50)), [5] * 6, 50, "0.0045 to 0.006"
    ),
    "pollution": Problem(
        POLLUTION,
        np.array([0, 0.2, 0, 0.04, 0, 0, 0.1, 0.3, 0.01, 0, 0, 0, 0, 0, 0, 0, 0.007, 0, 0, 0]),
        np.linspace(0.0, 60.0, 20),
        [10] * 3,
        25,
        "0.0025 to 0.004",
    ),
}


def mass_action(reactions, size):
    """Returns the field of reactions whose rates are a constant times the concentrations of what reacts."""
    constants = np.array([constant for constant, _, _ in reactions])
    educts = np.array([(*educts, 0)[:2] for _, educts, _ in reactions])  # number 0 has the concentration 1
    changes = np.zeros((len(reactions), size + 1))
    for change, (_, before, after) in zip(changes, reactions, strict=True):
        np.subtract.at(change, before, 1)
        np.add.at(change, after, 1)

    def field(y):
        padded = tf.concat([tf.ones_like(y[..., :1]), y], axis=-1)
        first, second = (tf.gather(padded, column, axis=-1) for column in educts.T)
        return tf.linalg.matvec(changes[:, 1:], constants * first * second, transpose_a=True)

    return field


def data(problem):
    """Returns the concentrations at all times, `(times, substances)`, and the range of each substance."""
    solver = keras_node.RungeKutta("esdirk54", rtol=1e-8, atol=1e-14)
    field = mass_action(problem.reactions, len(problem.start))

    @tf.function
    def solve():
        return keras_node.odeint(field, problem.start[None], problem.times, solver=solver).ys[:, 0]

    states = solve().numpy()
    return states, np.ptp(states, axis=0)


def learner(problem, scale, solver, gradient, epochs, jit_compile):
    """Returns a model of the concentrations at all times, divided by `scale`, as a function of those at the start."""
    size, end = len(scale), problem.times[-1]
    field = keras.Sequential(
        [
            keras.Input((size,)),
            *[keras.layers.Dense(width, activation="gelu") for width in problem.widths],
            keras.layers.Dense(size),
            keras.layers.Rescaling(scale / end),
        ]
    )
    start = keras.Input((size,))
    layer = keras_node.ODELayer(
        field, solver=solver, gradient=gradient, jit_compile=jit_compile, track_stats=True, name="ode"
    )
    model = keras.Model(start, keras.layers.Rescaling(1 / scale)(layer(start, ts=problem.times)))
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * UPDATES)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-6)
    steps = UPDATES if jit_compile else 1
    model.compile(optimizer, "mae", jit_compile=jit_compile, steps_per_execution=min(steps, 100))
    return model


class Clock(keras.callbacks.Callback):
    """Keeps the seconds since the beginning of training at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.began, self.seconds = time.perf_counter(), []

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


def train(problem, states, scale, solver, gradient, epochs, quick):
    """Trains a model. Returns its prediction at all times, the logs, and the seconds at the end of each epoch."""
    model = learner(problem, scale, solver, gradient, problem.epochs, not quick)
    # The state at the start has no error, so it is left out of the loss.
    weights = np.append(0.0, np.ones(len(states) - 1))[None]
    weights *= len(states) / (len(states) - 1)
    x, y, weights = (a.astype("float32") for a in (problem.start[None], (states / scale)[None], weights))
    samples = tf.data.Dataset.from_tensors((x, y, weights)).repeat(2 if quick else UPDATES)
    clock = Clock()
    callbacks = [clock, keras.callbacks.TerminateOnNaN()]
    logs = model.fit(samples, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks).history
    return model.predict(x, verbose=0)[0], logs, clock.seconds


def spread(values, digits):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def report(name, runs, published):
    """Prints what came of the trainings with all seeds, if a solve failed in any of them with the number of those."""
    last = [{key: values[-1] for key, values in logs.items()} for logs, _ in runs]
    failures = sum(max(logs["ode_failed"], logs.get("ode_backward_failed", 0)) > 0 for logs in last)
    updates = UPDATES * np.mean([len(seconds) for _, seconds in runs])
    loss = spread([logs["loss"] for logs in last], 5)
    evaluations = spread([logs["ode_evaluations"] for logs in last], 0)
    cells = f"{updates:8,.0f}{loss:>20}{evaluations:>13}{np.mean([seconds[-1] for _, seconds in runs]):9.0f}"
    verdict = f"a solve failed in {failures} of {len(runs)} trainings" if failures else published
    print(f"{name:34}{cells}  {verdict}", flush=True)


def draw(path, problem, states, scale, prediction, curves, pollution):
    """Draws the concentrations with what was learnt, and how the loss fell."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, substance, y, learnt in zip(axes[0], "ABC", states.T, prediction.T * scale[:, None], strict=True):
        axis.semilogx(problem.times[1:], y[1:], "o", ms=4, color="tab:blue", label="data")
        axis.semilogx(problem.times[1:], learnt[1:], color="k", label="learnt, esdirk43")
        axis.set(title=f"Robertson's substance {substance}", xlabel="seconds")
    axes[0, 0].legend()
    for i, (name, runs) in enumerate(curves.items()):
        for seed, (logs, seconds) in enumerate(runs):
            style = {"color": f"C{i}", "label": None if seed else name, "lw": 0.8}
            axes[1, 0].semilogy(seconds, logs["loss"], ".-", **style)
            axes[1, 1].semilogy(np.arange(len(seconds)) + 1, logs["ode_evaluations"], ".-", **style)
    axes[1, 0].set(title="Loss while it learns", xlabel="seconds of training")
    axes[1, 1].set(title="Evaluations of a solve", xlabel="thousands of updates")
    axes[1, 0].legend()
    if pollution is not None:
        problem, states, scale, prediction = pollution
        low = states.min(axis=0)
        for y, learnt in zip(((states - low) / scale).T, (prediction - low / scale).T, strict=True):
            (line,) = axes[1, 2].plot(problem.times, y, "o", ms=3)
            axes[1, 2].plot(problem.times, learnt, color=line.get_color())
        axes[1, 2].set(title="20 pollutants, each from its least to its most", xlabel="minutes")
    figure.savefig(path, dpi=120)


def main():
    """Learns both problems, the first one with explicit solves as well, prints a table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train on the first problem only, for a few seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("robertson.png"))
    options = parser.parse_args()

    implicit = keras_node.RungeKutta("esdirk43")
    explicit = keras_node.RungeKutta("tsit5")
    trials = {
        "esdirk43": (implicit, None),
        "tsit5, checkpointed": (explicit, "checkpointed"),
        "tsit5, backsolve": (explicit, "backsolve"),
    }
    seeds = 1 if options.quick else options.seeds
    print(f"{seeds} seed{'s' if seeds > 1 else ''}")
    print(f"{'':34}{'updates':>8}{'loss':>20}{'evaluations':>13}{'seconds':>9}  published")
    curves, results = {}, {}
    for problem_name, problem in PROBLEMS.items():
        if options.quick and problem_name != "Robertson":
            continue
        states, scale = data(problem)
        for name, (solver, gradient) in trials.items():
            if name != "esdirk43" and (problem_name != "Robertson" or options.quick):
                continue
            runs = []
            for seed in range(seeds):
                keras.utils.set_random_seed(seed)
                epochs = 2 if options.quick else problem.epochs
                prediction, *run = train(problem, states, scale, solver, gradient, epochs, options.quick)
                results.setdefault(problem_name, (problem, states, scale, prediction))
                runs.append(run)
            report(f"{problem_name}, {name}", runs, problem.published)
            if problem_name == "Robertson":
                curves[name] = runs
    print("published: Kim et al. (2021), read off their curves, after as many updates")
    draw(options.out, *results["Robertson"], curves, results.get("pollution"))
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
