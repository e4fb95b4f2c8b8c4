"""Learns dynamics from long series, where a solve over the whole series does not train.

Two systems are observed with noise of 5 % of their spread: Lotka and Volterra's predators and prey, over about a dozen
cycles, and Lorenz' chaotic system. The same network learns each in five ways:

- single shooting: one solve over the whole series;
- growing horizon: solves over windows of 50 intervals, which end after 5 at first, and later as training goes on;
- windows: solves over windows of 10 intervals, which begin at observations;
- multiple shooting: the same, with initial states that are trained, and a penalty on the gaps between windows;
- grey box (Lotka and Volterra only): multiple shooting with the equations known and four rates unknown, whose first
  guess is 2, and with a horizon that grows from one interval to the window.

Single shooting ends near the mean of the data: 50 steps ahead, its error is 0.7 and 1.4 of the spread. The others learn
the dynamics. The table shows the error of forecasts of test series, from true states, at 1, 10 and 50 steps ahead, in
units of the spread. No forecast of a chaotic system can be right for long.

    python examples/long_series.py            # see the gallery for the time
    python examples/long_series.py --quick    # hardly any training
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from scipy.integrate import solve_ivp

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATES = {"growth": 1.5, "eaten": 1.0, "decline": 3.0, "gained": 1.0}
WINDOW, LONG = 10, 50
SOLVER = keras_node.RungeKutta("bosh3", rtol=1e-3, atol=1e-4)


def lotka_volterra(y, growth, eaten, decline, gained):
    """Rates of change of prey and predators."""
    prey, predators = y[..., :1], y[..., 1:]
    meetings = prey * predators
    return keras.ops.concatenate([growth * prey - eaten * meetings, gained * meetings - decline * predators], axis=-1)


def lorenz(y):
    """Rates of change of Lorenz' system."""
    a, b, c = y
    return [10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c]


def predators_and_prey(y):
    """The same as `lotka_volterra`, for SciPy."""
    prey, predators = y
    return [1.5 * prey - prey * predators, prey * predators - 3 * predators]


def near_equilibrium(rng, number):
    """Returns numbers of predators and prey."""
    return rng.uniform(1, 4, (number, 2))


def on_attractor(rng, number):
    """Returns states of Lorenz' system after its path has come to the attractor."""
    starts = rng.uniform(-10, 10, (number, 3)) + np.array([0, 0, 25])
    return series(lorenz, starts, np.linspace(0, 5, 2), rng)[0][:, -1]


def series(rate, starts, times, rng):
    """Returns the true states at the times, and observations with noise."""
    options = {"t_eval": times, "rtol": 1e-9, "atol": 1e-9}
    true = np.stack([solve_ivp(lambda _, y: rate(y), times[[0, -1]], y0, **options).y.T for y0 in starts])
    return true, true + 0.05 * true.std((0, 1)) * rng.normal(size=true.shape)


def shooting(kind, epochs):
    """Returns a model, and the callbacks of its training."""
    options, callbacks, field = {"window": WINDOW}, [], None
    if kind == "single shooting":
        options = {}
    if kind == "growing horizon":
        options, callbacks = {"window": LONG}, [keras_node.GrowingHorizon(5, LONG, epochs // 2)]
    if kind in ("multiple shooting", "grey box"):
        options |= {"initial_states": "trained", "continuity": 1.0}
    if kind == "grey box":
        scalars = {name: keras_node.TrainableScalar(2.0, minimum=0.0) for name in RATES}
        field = keras_node.GreyBoxField(lotka_volterra, scalars)
        callbacks = [keras_node.GrowingHorizon(1, WINDOW, epochs // 2)]
    model = keras_node.DynamicsModel(field, solver=SOLVER, **options)
    rate = keras.optimizers.schedules.CosineDecay(5e-2 if field else 1e-2, epochs)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0))
    return model, callbacks


def draw(path, systems):
    """Draws the observations with forecasts of a test series, and the errors of forecasts."""
    figure, axes = plt.subplots(len(systems), 2, figsize=(12, 3.4 * len(systems)), layout="constrained", squeeze=False)
    for (left, right), (name, times, true, forecasts, errors, spread) in zip(axes, systems, strict=True):
        left.plot(times, true[:, 0], "k", lw=3, alpha=0.25, label="true")
        for kind, states in forecasts.items():
            left.plot(times, states[:, 0], lw=1.2, label=kind)
            right.plot(np.arange(1, len(errors[kind]) + 1), np.sqrt(np.mean((errors[kind] / spread) ** 2, axis=1)))
        left.set(
            xlabel="time t",
            title=f"{name}: forecast of a new series",
            ylim=np.ptp(true[:, 0]) * 0.25 * np.array([-1, 1]) + [true[:, 0].min(), true[:, 0].max()],
        )
        right.set(xlabel="steps ahead", ylabel="error / spread", ylim=(0, 1.6), title=f"{name}: error of forecasts")
        left.legend(fontsize=7, loc="upper right")
        right.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main():
    """Trains all models, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train two of the models for three epochs on short series")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("long_series.png"))
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    epochs, part = (3, 8) if options.quick else (800, 1)

    kinds = ("single shooting", "growing horizon", "windows", "multiple shooting")
    problems = {
        "predators and prey": (predators_and_prey, np.linspace(0, 50, 251), near_equilibrium),
        "Lorenz": (lorenz, np.linspace(0, 10, 501), on_attractor),
    }
    if options.quick:
        kinds = kinds[:1]
        del problems["Lorenz"]
    systems = []
    print("system               trained by            1 step   10 steps   50 steps   seconds")
    for name, (rate, times, starts) in problems.items():
        times = times[: len(times) // part]
        _, data = series(rate, starts(rng, 6), times, rng)
        true, _ = series(rate, starts(rng, 4), times, rng)
        spread = data.std((0, 1))
        forecasts, errors = {}, {}
        for kind in (*kinds, "grey box") if name == "predators and prey" else kinds:
            keras.utils.set_random_seed(options.seed)
            model, callbacks = shooting(kind, epochs)
            start = time.perf_counter()
            model.fit((times, data), epochs=epochs, batch_size=len(data), verbose=0, callbacks=callbacks)
            seconds = time.perf_counter() - start
            forecasts[kind] = model.predict((times, true), verbose=0)[0]
            errors[kind] = model.forecast_errors((times, true), horizon=min(50, len(times) - 1))
            relative = np.sqrt(np.mean((errors[kind] / spread) ** 2, axis=1))
            row = "   ".join(f"{relative[min(n, len(relative)) - 1]:8.3f}" for n in (1, 10, 50))
            print(f"{name:20} {kind:18} {row} {seconds:9.0f}", flush=True)
            if kind == "grey box":
                found = ", ".join(
                    f"{rate} {float(scalar.value):.3f} (true {RATES[rate]})"
                    for rate, scalar in model.vector_field.scalars.items()
                )
                print(f"rates of the grey box: {found}")
        systems.append((name, times, true[0], forecasts, errors, spread))
    draw(options.out, systems)
    print(f"\npicture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
