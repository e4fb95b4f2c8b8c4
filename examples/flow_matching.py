"""Trains flows with and without solves: by likelihood, and by flow matching.

Flow matching (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003) fits the field of a flow by a
regression, so a step of training is an ordinary step of a network. It is compared with training by likelihood on the
data of `flow_toys.py` and `flow_digits.py`. Every flow of a data set has the same field, and the same solver gives its
likelihood on test data. The noise is paired with the data

- at random (independent),
- within each batch by optimal transport (Tong et al. 2024, arXiv:2302.00482), which takes no condition, so it is left
  out for the digits given the digit,
- at random, and afterwards the flow takes a few steps by likelihood (fine-tuned).

The seconds are those of `fit`, with what TensorFlow takes to trace and compile. Of the digits there are few, so each
flow keeps the weights that are best on validation data; these checks are not in the seconds.

A fifth training is that by likelihood with the two penalties of Finlay et al. (2020, arXiv:2002.02798), with the
weights of the paper (regularized).

What came out, as the mean and the standard deviation over three seeds:

- With independent pairs, the flows come within 0.05 nats of those trained by likelihood on the eight Gaussians, and
  0.02 on the moons, in 4 and 12 % of the time. On the checkerboard they miss by 0.08 ± 0.05 nats, in 15 % of the time.
- On the digits they are 0.37 ± 0.05 nats better. But the steps and the learning rate of flow matching were chosen on
  validation data, and those of likelihood are the ones of `flow_digits.py`.
- Optimal transport needs fewer evaluations in a solve in the plane, and fits the checkerboard worse.
- The penalties change no likelihood in the plane by more than its spread. A solve takes 41 ± 8 evaluations instead of
  48 ± 3 on the checkerboard, and 42 ± 9 instead of 48 ± 9 on the moons: less, though not beyond the spread.

    python examples/flow_matching.py            # 50 minutes on one core
    python examples/flow_matching.py --quick    # eight Gaussians, hardly any training
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import pathlib
import time

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from flow_digits import digits
from flow_toys import EDGE, QUICK, SOLVER, TOYS

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Training:
    """How `fit` is called.

    Flow matching takes several steps in an execution, because most of the time would be spent between its short steps.
    """

    steps: int
    batch: int
    rate: float  # at the start; it falls to zero
    checks: int = 1  # how often the weights are compared on validation data, if there are any
    jit_compile: bool | str = "auto"
    steps_per_execution: int = 1


LIKELIHOOD = Training(2000, 256, 5e-3)
FINE_TUNING = Training(50, 256, 2e-3, jit_compile=False)
INDEPENDENT = Training(8000, 256, 1e-2, jit_compile=False, steps_per_execution=50)
TRANSPORT = Training(4000, 128, 1e-2, jit_compile=True, steps_per_execution=50)
TRAININGS = {
    name: {
        "likelihood": LIKELIHOOD,
        "regularized": LIKELIHOOD,
        "independent": dataclasses.replace(INDEPENDENT, steps=2500 if name == "eight Gaussians" else 8000),
        "fine-tuned": FINE_TUNING,
        "optimal transport": TRANSPORT,
    }
    for name in TOYS
}
TRAININGS["digits"] = {
    "likelihood": dataclasses.replace(LIKELIHOOD, steps=800, batch=128, rate=3e-3, checks=32),
    "regularized": dataclasses.replace(LIKELIHOOD, steps=800, batch=128, rate=3e-3, checks=32),
    "independent": dataclasses.replace(INDEPENDENT, steps=2000, batch=128, checks=10),
    "fine-tuned": dataclasses.replace(FINE_TUNING, steps=50, batch=128, rate=1e-3, checks=2),
}
# What differs between the flows of one data set.
OBJECTIVES = {
    "likelihood": {},
    "regularized": {"kinetic_energy": 0.01, "jacobian_norm": 0.01},
    "independent": {"objective": "flow_matching"},
    "optimal transport": {"objective": "flow_matching", "coupling": "optimal_transport"},
}
HIDDEN_UNITS, ACTIVATION = (64, 64, 64), "swish"
SHOWN = 40  # the number of paths in a picture


def train(flow, draw, validation, training):
    """Trains a flow by its objective, and returns the seconds that `fit` takes."""
    rate = keras.optimizers.schedules.CosineDecay(training.rate, training.steps)
    flow.compile(
        keras.optimizers.Adam(rate),
        jit_compile=training.jit_compile,
        steps_per_execution=training.steps_per_execution,
    )
    if not flow.built:
        flow.build(keras.tree.map_structure(np.shape, draw(1)))
    flow.optimizer.build(flow.trainable_variables)  # so that TensorFlow traces a step only once
    seconds, best = 0.0, (np.inf, None)
    for _ in range(training.checks):
        data = draw(training.steps // training.checks * training.batch)
        start = time.perf_counter()
        flow.fit(data, batch_size=training.batch, shuffle=False, verbose=0)
        seconds += time.perf_counter() - start
        if validation is not None:
            nll = flow.evaluate(validation, batch_size=1000, verbose=0, return_dict=True)["loss"]
            best = min(best, (nll, flow.get_weights()), key=lambda pair: pair[0])
    if validation is not None:
        flow.set_weights(best[1])
    return seconds


def compare(dim, draw, validation, test, trainings, solver, seed):
    """Trains the flows of one data set. Returns their results, and their pictures, by their names."""
    results, pictures, flow = {}, {}, None
    for label, training in trainings.items():
        if label == "fine-tuned":
            flow.objective = "likelihood"  # the flow of the row before
        else:
            keras.utils.set_random_seed(seed)
            field = keras_node.ConcatSquashField(HIDDEN_UNITS, ACTIVATION)
            flow = keras_node.ContinuousFlow(
                dim, field, solver=solver, seed=seed, track_stats=True, name="flow", **OBJECTIVES[label]
            )
        seconds = train(flow, draw, validation, training)
        if label == "fine-tuned":
            seconds += results["independent"][1]
        logs = flow.evaluate(test, batch_size=5000, verbose=0, return_dict=True)
        results[label] = logs["loss"], seconds, logs["flow_evaluations"]
        if dim == 2:
            pictures[label] = picture(flow)
    return results, pictures


def print_rows(name, runs):
    """Prints the means and, if there are several runs, the standard deviations of one data set."""
    for label in runs[0]:
        results = np.array([run[label] for run in runs])
        first = np.array([run["likelihood"] for run in runs])
        nll, seconds, evaluations = results.T
        differences, shares = nll - first[:, 0], seconds / first[:, 1]
        print(
            f"{name:15} {label:17} {spread(nll):>15} {spread(differences):>15} {np.mean(seconds):8.1f} "
            f"{np.mean(shares):6.3f} {spread(evaluations, 0):>12}",
            flush=True,
        )


def spread(values, digits=3):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def picture(flow):
    """Returns the density on a grid, and paths from noise to data."""
    side = np.linspace(-EDGE, EDGE, 120, dtype="float32")
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    density = np.exp(flow.predict(grid, batch_size=4800, verbose=0)).reshape(120, 120)
    z = keras.random.normal((SHOWN, 2), seed=0)

    @tf.function
    def paths():
        return keras_node.odeint(flow.vector_field, z, np.linspace(0, 1, 30), solver=flow.solver).ys

    return density, paths().numpy()


def draw_pictures(path, rows):
    """Draws the data and, for each flow, its density with some paths from noise to data."""
    labels = list(next(iter(rows.values()))[1])
    figure, axes = plt.subplots(
        len(rows),
        1 + len(labels),
        figsize=(2.6 * (1 + len(labels)), 2.8 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for (name, (data, pictures)), axis in zip(rows.items(), axes, strict=True):
        axis[0].hist2d(*data.T, bins=90, range=[(-EDGE, EDGE)] * 2, cmap="magma", density=True)
        axis[0].set_title(f"{name}: data", fontsize=10)
        for label, panel in zip(labels, axis[1:], strict=True):
            density, paths = pictures[label]
            panel.imshow(density, extent=(-EDGE, EDGE) * 2, origin="lower", cmap="magma")
            panel.plot(*paths.transpose(2, 0, 1), color="white", linewidth=0.5, alpha=0.6)
            panel.plot(*paths[-1].T, ".", color="white", markersize=2)
            panel.set_title(label, fontsize=10)
    for panel in axes.flat:
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=80)


def quickly(trainings):
    """Returns two trainings of a few steps, without compiling, which takes longer."""
    few = {"steps": 10, "batch": 32, "jit_compile": False, "steps_per_execution": 10}
    return {label: dataclasses.replace(trainings[label], **few) for label in ("likelihood", "independent")}


def run(name, seed, options):
    """Trains the flows of one data set with one seed. Returns data, and what `compare` returns."""
    rng = np.random.default_rng(seed)
    if name == "digits":
        (train_part, validation, test), _ = digits(options.components)
        draw = functools.partial(chosen, train_part, rng)
        return test, *compare(options.components, draw, validation, test, TRAININGS[name], SOLVER, seed)
    sample, _ = TOYS[name]
    test = points(sample, rng, 1000 if options.quick else 20000)
    draw = functools.partial(points, sample, rng)
    trainings, solver = (quickly(TRAININGS[name]), QUICK) if options.quick else (TRAININGS[name], SOLVER)
    return test, *compare(2, draw, None, test, trainings, solver, seed)


def main():
    """Trains all flows, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train on the eight Gaussians only, for a few seconds")
    parser.add_argument("--components", type=int, default=8, help="number of principal components of the digits")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds, and the one of the picture")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flow_matching.png"))
    options = parser.parse_args()
    names, count = (["eight Gaussians"], 1) if options.quick else ([*TOYS, "digits"], options.seeds)
    seeds = range(options.seed, options.seed + count)

    rows = {}
    print(f"{count} seed{'s' if count > 1 else ''}")
    print("data set        training                 test NLL      difference  seconds  share  evaluations")
    # TensorFlow keeps the graphs of models that are gone, 100 megabytes each, so every run has a separate process.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for name in names:
            jobs = [name] * count, seeds, [options] * count
            tests, results, pictures = zip(*(map if options.quick else pool.map)(run, *jobs), strict=True)
            print_rows(name, results)
            if pictures[0]:
                rows[name] = tests[0], pictures[0]
    draw_pictures(options.out, rows)
    print(f"picture: {options.out.resolve()}")


def points(sample, rng, n):
    """Returns new samples in single precision."""
    return sample(rng, n).astype("float32")


def chosen(part, rng, n):
    """Returns digits of the training part, chosen at random, with their conditions."""
    rows = rng.integers(0, len(part[0]), n)
    return tuple(array[rows] for array in part)


if __name__ == "__main__":
    main()
