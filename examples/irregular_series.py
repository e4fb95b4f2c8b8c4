"""Classifies series of which a part of the values is missing: ODE-RNN and neural CDE beside two GRUs.

Two data sets that the package `aeon` holds: BasicMotions (four activities, 6 channels of a smart watch at 100 moments,
40 series for training and 40 for the test) and ItalyPowerDemand (summer or winter, 24 hours of demand, 67 and 1029
series). Of every series 30, 50 or 70 % of the values are dropped, each channel and moment by itself, so that the
channels are observed at different times. Kidger et al. (2020, arXiv:2005.08926) did this with whole moments of
CharacterTrajectories, which the package does not hold; their figures are printed too, but are of another data set. The
networks:

- ODE-RNN (Rubanova et al. 2019, arXiv:1907.03907): the state follows an ODE between moments with observations.
- Neural CDE (Kidger et al. 2020): the path through the observations of each channel drives the state.
- GRU: it is called at moments with observations, and gets the time since the last one as a further channel.
- GRU-D (Che et al. 2018, arXiv:1606.01865): a missing value decays from the last one to the mean, and the state decays
  too, at rates that are learnt.

All have 32 units and are trained in the same way. In every epoch more values are hidden at random: without that, the
networks learn the few series by heart. The learning rates, one for each network, and the epochs were chosen by their
mean accuracy on a quarter of the training series, which `--validate` holds out.

    pip install aeon                                # the data
    python examples/irregular_series.py             # ten minutes on one core
    python examples/irregular_series.py --quick     # one data set, barely trained, in half a minute
"""

import argparse
import importlib.util
import pathlib
import time

import keras
import matplotlib
import numpy as np
from keras import ops
from sklearn.model_selection import train_test_split

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UNITS, BATCH = 32, 20
RATES = (0.3, 0.5, 0.7)
KINDS = ("ODE-RNN", "neural CDE", "GRU", "GRU-D")
# Kidger et al. (2020), table 1, for CharacterTrajectories.
ELSEWHERE = {
    "ODE-RNN": (95.4, 96.0, 95.3),
    "neural CDE": (98.7, 98.8, 98.6),
    "GRU": (93.6, 91.3, 90.4),
    "GRU-D": (94.2, 90.2, 91.9),
}
EPOCHS = {"BasicMotions": 300, "ItalyPowerDemand": 400}
LEARNING_RATES = {"ODE-RNN": 3e-3, "neural CDE": 1e-2, "GRU": 1e-2, "GRU-D": 1e-2}
SOLVER = keras_node.RungeKutta("midpoint", num_steps=1)


def load(name, part):
    """Returns the series of a part, `(series, moments, channels)`, and their classes."""
    # The files are in the package aeon. Importing it would take many seconds.
    aeon = importlib.util.find_spec("aeon")
    if aeon is None:
        raise SystemExit("This example needs the data in the package aeon: pip install aeon")
    path = pathlib.Path(aeon.origin).parent / f"datasets/data/{name}/{name}_{part}.ts"
    rows = [line.split(":") for line in path.read_text().split("@data")[1].split()]
    series = np.array([[channel.split(",") for channel in row[:-1]] for row in rows], "float32").transpose(0, 2, 1)
    return series, np.unique([row[-1] for row in rows], return_inverse=True)[1]


def drop(series, share, rng):
    """Replaces a share of the values by NaN, the same or one for each series. Each channel keeps one value at least."""
    hidden = rng.random(series.shape) < share
    hidden &= np.any(~hidden & ~np.isnan(series), axis=1, keepdims=True)
    return np.where(hidden, np.nan, series)


def scaled(parts):
    """Gives each channel the mean 0 and the deviation 1 of the observed values of the first part."""
    mean, deviation = np.nanmean(parts[0], (0, 1)), np.nanstd(parts[0], (0, 1))
    return [(part - mean) / deviation for part in parts]


def inputs(series):
    """Returns the values with zeros for what is missing, the times, and the marks of what was observed.

    In addition, what GRU-D gets: the last value of each channel before each moment, and the time since then.
    """
    number, moments, _ = series.shape
    marks, values = ~np.isnan(series), np.nan_to_num(series)
    # In moments, times would be far larger than the values, and the rates of change that must be learnt far smaller.
    times = np.tile(np.linspace(0, 3, moments, endpoint=False, dtype="float32"), (number, 1))
    now = np.where(marks, np.arange(moments)[:, None], -1)
    last = np.pad(np.maximum.accumulate(now, axis=1)[:, :-1], [(0, 0), (1, 0), (0, 0)], constant_values=-1)
    before = np.where(last < 0, 0, np.take_along_axis(values, np.maximum(last, 0), axis=1))
    since = np.arange(moments)[:, None] - np.maximum(last, 0)
    return [a.astype("float32") for a in (values, times, marks, before, since)]


@keras.saving.register_keras_serializable(package="irregular_series")
class GRUDCell(keras.layers.Layer):
    """The cell of GRU-D. Its input holds values, marks, last values and the time since them; the means must be zero."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.cell = keras.layers.GRUCell(units)
        # All decays start above zero: where the relu is flat, a rate would never be learnt.
        self.start = keras.initializers.RandomUniform(0.01, 0.1)
        self.decay_of_state = keras.layers.Dense(units, activation="relu", kernel_initializer=self.start)
        self.state_size = self.output_size = units

    def build(self, shape):
        channels = shape[-1] // 4
        self.rate = self.add_weight(shape=(channels,), initializer=self.start, name="rate")
        self.bias = self.add_weight(shape=(channels,), initializer="zeros", name="bias")
        self.decay_of_state.build((None, channels))
        self.cell.build((None, 2 * channels))

    def call(self, inputs, states, training=None):
        x, marks, before, since = ops.split(inputs, 4, axis=-1)
        x = ops.where(marks > 0, x, before * ops.exp(-ops.relu(self.rate * since + self.bias)))
        h = states[0] * ops.exp(-self.decay_of_state(since))
        return self.cell(ops.concatenate([x, marks], axis=-1), [h], training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.state_size}


def classifier(kind, moments, channels, classes):
    """Returns a model of one of the kinds, which computes the logits of the classes."""
    x, marks, before, since = (keras.Input((moments, channels)) for _ in range(4))
    times = keras.Input((moments,))
    some = ops.any(marks > 0, axis=-1)
    marked = ops.concatenate([x, marks], axis=-1)
    if kind == "neural CDE":
        hidden = keras.layers.Dense(UNITS, activation="relu")
        field = keras.Sequential([hidden, keras.layers.Dense(UNITS * (1 + channels), activation="tanh")])
        cde = keras_node.NeuralCDE(UNITS, field, interpolation="linear", solver=SOLVER, gradient="direct")
        h = cde(x, times, mask=marks > 0)
    elif kind == "ODE-RNN":
        still = keras.layers.Dense(UNITS, kernel_initializer="zeros")  # so that at first nothing moves
        field = keras.Sequential([keras.layers.Dense(UNITS, activation="tanh"), still])
        cell = keras.layers.GRUCell(UNITS)
        h = keras_node.ODERNN(cell, field, solver=SOLVER, gradient="direct")(marked, times, mask=some)
    elif kind == "GRU":
        # The time since the last moment with an observation.
        elapsed = ops.min(since, axis=-1, keepdims=True)
        h = keras.layers.GRU(UNITS)(ops.concatenate([marked, elapsed], axis=-1), mask=some)
    else:
        h = keras.layers.RNN(GRUDCell(UNITS))(ops.concatenate([x, marks, before, since], axis=-1))
    return keras.Model([x, times, marks, before, since], keras.layers.Dense(classes)(keras.layers.Dropout(0.2)(h)))


def compiled(kind, shape, classes, updates, jit_compile):
    """Returns a model of one of the kinds, compiled for training with so many updates."""
    model = classifier(kind, *shape, classes)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATES[kind], updates)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, clipnorm=1.0)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=jit_compile)
    return model


def restart(model, weights):
    """Gives a model other weights, and its optimizer its first state. Compiling a new model would take longer."""
    model.set_weights(weights)
    for variable in model.optimizer.variables:
        variable.assign(ops.zeros_like(variable))


def train(model, data, epochs, rng):
    """Returns the accuracy in % of the trained model, and the seconds that an update took in the last half.

    In every epoch up to half of the values that are left of a series are hidden in addition. Otherwise all networks
    learn the few series and their marks by heart.
    """
    series, test_series, classes, test_classes = data
    orders = [rng.permutation(len(classes)) for _ in range(epochs)]
    varied = [drop(series[order], rng.uniform(0, 0.5, (len(series), 1, 1)), rng) for order in orders]
    half = epochs // 2
    for part in (slice(half), slice(half, epochs)):
        start, done = time.perf_counter(), int(model.optimizer.iterations)
        x, y = inputs(np.concatenate(varied[part])), classes[np.concatenate(orders[part])]
        model.fit(x, y, BATCH, shuffle=False, verbose=0)
        seconds = (time.perf_counter() - start) / (int(model.optimizer.iterations) - done)
    scores = model.evaluate(inputs(test_series), test_classes, len(test_classes), verbose=0, return_dict=True)
    return 100 * scores["accuracy"], seconds


def spread(values):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def draw(path, results):
    """Draws the accuracies against the share that was dropped."""
    names = list(dict.fromkeys(name for name, _, _ in results))
    figure, panels = plt.subplots(1, len(names), figsize=(6 * len(names), 4.2), layout="constrained", squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        rates = sorted({rate for n, rate, _ in results if n == name})
        for i, (kind, marker) in enumerate(zip(KINDS, "os^v", strict=True)):
            runs = np.array([results[name, rate, kind] for rate in rates])
            at = 100 * np.array(rates) + i - 1.5
            axes.errorbar(at, runs.mean(axis=1), runs.std(axis=1, ddof=1), marker=marker, capsize=4, label=kind)
        axes.set(title=name, xlabel="values dropped, %", ylabel="test accuracy, %", xticks=[100 * r for r in rates])
        axes.grid(alpha=0.3)
    panels[0, 0].legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Trains all networks, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for two epochs on ItalyPowerDemand")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--validate", action="store_true", help="hold out a quarter of the training series as the test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("irregular_series.png"))
    options = parser.parse_args()
    names, rates, seeds = list(EPOCHS), RATES, options.seeds
    if options.quick:
        names, rates, seeds = names[1:], RATES[1:2], 1

    results = {}
    print(f"accuracy in %, {seeds} seed{'s' if seeds > 1 else ''}")
    heads = "".join(f"{f'{rate:.0%} dropped':>16}" for rate in rates)
    print(f"{'data':18}{'network':12}{heads}   weights  ms an update")
    for name in names:
        epochs = 2 if options.quick else EPOCHS[name]
        series, classes = load(name, "TRAIN")
        test_series, test_classes = load(name, "TEST")
        parts = series, test_series, classes, test_classes
        for kind in KINDS:
            updates = epochs * len(classes) // BATCH
            model = compiled(kind, series.shape[1:], len(set(classes)), updates, jit_compile=not options.quick)
            seconds = []
            for rate in rates:
                for seed in range(options.seed, options.seed + seeds):
                    if options.validate:  # other series are held out with every seed
                        parts = train_test_split(series, classes, test_size=0.25, stratify=classes, random_state=seed)
                    rng = np.random.default_rng(seed)
                    data = *scaled([drop(part, rate, rng) for part in parts[:2]]), *parts[2:]
                    keras.utils.set_random_seed(seed)
                    restart(model, classifier(kind, *series.shape[1:], len(set(classes))).get_weights())
                    accuracy, took = train(model, data, epochs, rng)
                    results.setdefault((name, rate, kind), []).append(accuracy)
                    seconds.append(took)
            cells = "".join(f"{spread(results[name, rate, kind]):>16}" for rate in rates)
            print(f"{name:18}{kind:12}{cells} {model.count_params():9,} {1e3 * np.median(seconds):13.1f}", flush=True)
    for kind, accuracies in () if options.quick else ELSEWHERE.items():
        print(f"{'another data set':18}{kind:12}{''.join(f'{accuracy:16.1f}' for accuracy in accuracies)}   published")
    draw(options.out, results)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
