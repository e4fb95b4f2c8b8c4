"""Identifies nine speakers by their vowels, of which only some moments were kept.

Each series is an utterance of `ae` by one of nine men, with 12 coefficients of its sound at 7 to 29 moments
(Kudo, Toyama & Shimbo 1999; 270 series for training, 370 for testing). In every series a random part of the moments is
dropped, so the remaining moments are irregular. The script compares three networks: an ODE-RNN, whose state follows an
ODE across the gaps; a GRU, which gets the time since the last moment as a further channel; and a neural CDE, whose
state is driven by a path through the moments.

It trains all three at three rates of dropped moments with several seeds, prints the test accuracies, and draws how the
probabilities that an ODE-RNN gives to the speakers change during an utterance. For both recurrent networks, the number
of units and the dropout of the input were chosen among six settings, by threefold cross-validation on the training
series. For the neural CDE, the path, initialization and dropout were chosen among seven settings, by two of these folds
at 50 %.

    pip install aeon                              # the data
    python examples/japanese_vowels.py            # 27 networks: seven minutes on two cores
    python examples/japanese_vowels.py --quick    # 15 seconds
"""

import argparse
import importlib.util
import pathlib
import time

import keras
import matplotlib
import numpy as np

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LONGEST, CHANNELS, CLASSES, UNITS, BATCH = 29, 12, 9, 32, 30
MOMENT = 0.1  # in units of time, so that a series lasts for about one or two units
KINDS = ("ODE-RNN", "GRU", "neural CDE")
ELSEWHERE = {"ODE-RNN": 99.0, "GRU": 96.9}  # with half of the moments dropped, reference code in PyTorch


def load(split):
    """Returns the series of a split, a list of arrays (length, 12), and their speakers, numbers from 0 to 8."""
    # The files are in the package aeon. Importing it would take many seconds.
    aeon = importlib.util.find_spec("aeon")
    if aeon is None:
        raise SystemExit("This example needs the data in the package aeon: pip install aeon")
    package = pathlib.Path(aeon.origin).parent
    lines = (package / f"datasets/data/JapaneseVowels/JapaneseVowels_{split}.ts").read_text().split("@data")[1].split()
    rows = [line.split(":") for line in lines]
    series = [np.array([channel.split(",") for channel in row[:-1]], "float32").T for row in rows]
    return series, np.array([int(row[-1]) - 1 for row in rows])


def drop(series, rate, rng):
    """Drops moments. Returns the rest of each series in order: values (series, 29, 12), times and mask (series, 29)."""
    x = np.zeros((len(series), LONGEST, CHANNELS), "float32")
    times, mask = np.zeros(x.shape[:2], "float32"), np.zeros(x.shape[:2], bool)
    for i, values in enumerate(series):
        number = max(1, round((1 - rate) * len(values)))
        kept = np.sort(rng.choice(len(values), number, replace=False))
        x[i, :number], times[i, :number], mask[i, :number] = values[kept], MOMENT * kept, True
    return [x, times, mask]


def classifier(kind, solver, jit_compile):
    """Returns a model of one of the three kinds, which computes the logits of the speakers."""
    x, times = keras.Input((LONGEST, CHANNELS)), keras.Input((LONGEST,))
    mask = keras.Input((LONGEST,), dtype="bool")
    y = keras.layers.Dropout(0.4)(x)  # 270 series are few
    if kind == "neural CDE":
        # Ordinary dropout would set values to zero, and the path would go through these zeros. So make them missing.
        kept = keras.layers.Dropout(0.3)(keras.ops.ones_like(x)) > 0
        field = [
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(UNITS * (1 + CHANNELS), activation="tanh"),
        ]
        layer = keras_node.NeuralCDE(
            UNITS,
            keras.Sequential(field),
            interpolation="linear",
            solver=keras_node.RungeKutta("midpoint", num_steps=1),
            gradient="direct",
        )
        h = layer(x, times, mask=keras.ops.logical_and(kept, mask[..., None]))
    elif kind == "ODE-RNN":
        field = keras.Sequential([keras.layers.Dense(UNITS, activation="tanh"), keras.layers.Dense(UNITS)])
        cell = keras.layers.GRUCell(UNITS)
        h = keras_node.ODERNN(cell, field, solver=solver, jit_compile=jit_compile)(y, times, mask=mask)
    else:
        elapsed = keras.ops.diff(keras.ops.pad(times, [(0, 0), (1, 0)]), axis=1)[..., None]
        h = keras.layers.GRU(UNITS)(keras.ops.concatenate([y, elapsed], axis=-1), mask=mask)
    h = keras.layers.Dropout(0.3)(h)
    return keras.Model([x, times, mask], keras.layers.Dense(CLASSES)(h))


def train(model, data, epochs, jit_compile):
    """Trains the model and returns the test accuracy in %."""
    (inputs, labels), (test_inputs, test_labels) = data
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * len(labels) // BATCH)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=1e-2, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    model.fit(inputs, labels, BATCH, epochs, verbose=0)
    return 100 * model.evaluate(test_inputs, test_labels, len(test_labels), verbose=0)[1]


def probabilities(model, values, times):
    """Returns the probabilities of the speakers along one series, including the gaps: times and (times, 9)."""
    (layer,) = (part for part in model.layers if isinstance(part, keras_node.ODERNN))
    cell, head = layer.cell, model.layers[-1]
    ts, path, states = [], [], cell.get_initial_state(1)
    for x, start, end in zip(values, times, [*times[1:], times[-1] + MOMENT], strict=True):
        _, states = cell.cell(x[None], states)
        gap = np.linspace(start, end, 20, dtype="float32")
        h = keras_node.odeint(cell.vector_field, states[0], gap, solver=cell.solver).ys
        ts.append(gap)
        path.append(h[:, 0])
        states = [h[-1]]
    return np.concatenate(ts), keras.ops.softmax(head(np.concatenate(path)))


def draw(path, results, model, inputs, label):
    """Draws the test accuracies, and the probabilities of the speakers along one series."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=[2, 3], layout="constrained")
    for kind, marker in zip(KINDS, "os^", strict=True):
        rates = sorted({rate for rate, k in results if k == kind})
        runs = np.array([results[rate, kind] for rate in rates])
        left.errorbar(100 * np.array(rates), runs.mean(1), runs.std(1), marker=marker, capsize=4, label=kind)
    left.set(title="Test accuracy in %", xlabel="moments dropped in %", xticks=[100 * rate for rate in rates])
    left.legend(loc="lower left")
    values, times, mask = inputs
    ts, chances = probabilities(model, values[mask], times[mask])
    for speaker, chance in enumerate(np.transpose(chances)):
        style = {"lw": 2.5, "color": "tab:blue"} if speaker == label else {"lw": 1, "color": "0.6"}
        right.plot(ts / MOMENT, chance, **style)
    right.vlines(times[mask] / MOMENT, 0, 1, color="0.85", zorder=0)
    right.set(title="Probability of the nine speakers, the true one in blue", xlabel="moment (lines: those kept)")
    figure.savefig(path, dpi=130)


def main():
    """Trains all networks, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("japanese_vowels.png"))
    options = parser.parse_args()
    jit_compile = not options.quick  # compiling takes longer than a quick run
    solver = keras_node.RungeKutta("midpoint", num_steps=1) if options.quick else "bosh3"
    epochs, seeds, rates = (1, 1, (0.5,)) if options.quick else (options.epochs, options.seeds, (0.3, 0.5, 0.7))

    train_series, train_labels = load("TRAIN")
    test_series, test_labels = load("TEST")
    stacked = np.concatenate(train_series)
    for series in (train_series, test_series):
        series[:] = [(s - stacked.mean(0)) / stacked.std(0) for s in series]
    results, start = {}, time.perf_counter()
    print(f"{'dropped':8}{''.join(f'{kind:>16}' for kind in KINDS)}   (accuracy in %, {seeds} seed(s))")
    for rate in rates:
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            inputs, test_inputs = drop(train_series, rate, rng), drop(test_series, rate, rng)
            data = [(inputs, train_labels), (test_inputs, test_labels)]
            for kind in reversed(KINDS):  # the last one is drawn
                keras.utils.set_random_seed(seed)
                model = classifier(kind, solver, jit_compile)
                results.setdefault((rate, kind), []).append(train(model, data, epochs, jit_compile))
        runs = [results[rate, kind] for kind in KINDS]
        print(f"{rate:<8.0%}" + "".join(f"{f'{np.mean(r):.1f} ± {np.std(r):.1f}':>16}" for r in runs), flush=True)
    print(f"{'50%':8}{ELSEWHERE['ODE-RNN']:>16}{ELSEWHERE['GRU']:>16}   measured elsewhere, with reference code")
    print(f"{time.perf_counter() - start:.0f} seconds")

    sample = int(np.argmax([len(s) for s in test_series]))
    draw(options.out, results, model, [a[sample] for a in test_inputs], test_labels[sample])
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
