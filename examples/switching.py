"""Learns a system that switches between linear dynamics, and the curve where it switches, by a neural event function.

A state in the plane rotates, and where it crosses a curve, it goes over to other linear dynamics. The model knows that
there are two linear regimes, but not where the curve is. The curve is the zero of a network, the event function. At an
event the reset changes the regime, which is a part of the state. So the gradient of everything that comes later goes
through the moment of the event into the network: nobody ever tells it where the system switched.

The two regimes are known roughly, each number of their matrices up to 20 %, and are trained too. Without such a start,
training ends where one regime does everything: a curve that no path crosses has no gradient. Beside it stands an
ordinary neural ODE, whose field must be smooth.

The idea is that of Chen, Amos & Nickel (2021), "Learning Neural Event Functions for Ordinary Differential Equations",
arXiv:2011.03902. Their data are not published, and this system is our own.

    python examples/switching.py            # six minutes on one core
    python examples/switching.py --quick    # hardly any training, in seconds
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from keras import ops

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIMES = np.linspace(0.1, 3.0, 30).tolist()
LONG = np.linspace(0.1, 9.0, 90).tolist()
NOISE, TRAIN, TEST, BATCH, WINDOW = 0.02, 100, 100, 100, 10
MATRICES = np.array([[[-0.1, 1.5], [-1.5, -0.1]], [[0.1, 0.6], [-3.0, 0.1]]])
SHIFTS = np.zeros((2, 2))
SOLVER = keras_node.RungeKutta("tsit5", rtol=1e-3, atol=1e-4, max_steps=256)


@keras.saving.register_keras_serializable(package="examples")
class Regimes(keras.layers.Layer):
    """The field of a state `(x, y, m)`: `dx/dt = A[m] x + b[m]`, where the regime `m` is 0 or 1 and constant.

    Args:
        matrices: the first values of `A`, `(2, 2, 2)`.
        shifts: the first values of `b`, `(2, 2)`.
    """

    def __init__(self, matrices, shifts, **kwargs):
        super().__init__(**kwargs)
        self.matrices, self.shifts = matrices, shifts

    def build(self, t_shape, y_shape):
        start = keras.initializers.Constant
        self.a = self.add_weight(shape=(2, 2, 2), initializer=start(self.matrices), name="a")
        self.b = self.add_weight(shape=(2, 2), initializer=start(self.shifts), name="b")

    def call(self, t, y):
        x, m = y[:, :2], y[:, 2:]
        first, second = (ops.matmul(x, ops.transpose(self.a[i])) + self.b[i] for i in range(2))
        return ops.concatenate([first + m * (second - first), ops.zeros_like(m)], axis=1)


@keras.saving.register_keras_serializable(package="examples")
def other_regime(t, y):
    """The reset: the same place, in the other regime."""
    return ops.concatenate([y[:, :2], 1 - y[:, 2:]], axis=1)


@keras.saving.register_keras_serializable(package="examples")
class Side(keras.layers.Layer):
    """The event function: a function of the place alone.

    Args:
        function: a layer that takes the place, `(batch, 2)`, and returns `(batch, 1)`.
    """

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, y):
        return self.function(y[:, :2])


@keras.saving.register_keras_serializable(package="examples")
class Switching(keras.layers.Layer):
    """Moves places `(batch, 2)` through time. The side on which a path starts tells its regime.

    Args:
        field: a `Regimes`.
        side: a `Side`.
        times: the times of the output.
    """

    def __init__(self, field, side, times, **kwargs):
        super().__init__(**kwargs)
        event = keras_node.Event(side, reset=other_regime)
        self.times, self.side = times, side
        self.solve = keras_node.ODELayer(field, event=event, max_events=24, solver=SOLVER)

    def call(self, x):
        regime = ops.cast(self.side(x) > 0, x.dtype)
        return self.solve(ops.concatenate([x, regime], axis=1), ts=self.times)[..., :2]

    def compute_output_shape(self, shape):
        return (shape[0], len(self.times), 2)


@keras.saving.register_keras_serializable(package="examples")
class Paths(keras.layers.Layer):
    """Moves places through time by an ordinary field.

    Args:
        field: a layer.
        times: the times of the output.
    """

    def __init__(self, field, times, **kwargs):
        super().__init__(**kwargs)
        self.times = times
        self.solve = keras_node.ODELayer(field, solver=SOLVER)

    def call(self, x):
        return self.solve(x, ts=self.times)

    def compute_output_shape(self, shape):
        return (shape[0], len(self.times), 2)


def true_side(x):
    """The true curve, a wave."""
    return x[:, 1:2] - 0.6 * ops.sin(1.5 * x[:, :1])


def mlp(width, outputs):
    """A network with two hidden layers."""
    hidden = [keras.layers.Dense(width, activation="tanh") for _ in range(2)]
    return keras.Sequential([*hidden, keras.layers.Dense(outputs)])


def model_of(layer):
    """A model from places to paths."""
    inputs = keras.Input((2,))
    return keras.Model(inputs, layer(inputs))


def finite_paths(y_true, y_pred):
    """The mean squared error without paths of NaN: those that switched more often than the layer allows."""
    return ops.mean((ops.where(ops.isnan(y_pred), y_true, y_pred) - y_true) ** 2)


def draw(path, start, true, predicted, side):
    """Draws some long paths, and the learnt curve over the true one."""
    figure, (axes,) = plt.subplots(1, len(predicted), figsize=(12, 5), layout="constrained", squeeze=False)
    grid = np.stack(np.meshgrid(np.linspace(-2.5, 2.5, 150), np.linspace(-3, 3, 150)), axis=-1).astype("float32")
    flat = grid.reshape(-1, 2)
    truth, learnt = (np.reshape(ops.convert_to_numpy(f(flat)), (150, 150)) for f in (true_side, side))
    for axis, (name, paths) in zip(axes, predicted.items(), strict=True):
        axis.contour(*np.moveaxis(grid, -1, 0), truth, [0], colors="0.6", linewidths=4)
        if name == "neural event function":
            axis.contour(*np.moveaxis(grid, -1, 0), learnt, [0], colors="tab:red", linewidths=1.5)
        for i in range(4):
            axis.plot(*true[i].T, color="tab:blue", lw=4, alpha=0.3)
            axis.plot(*paths[i].T, color="k", lw=0.8)
            axis.plot(*start[i], "ko", ms=4)
        axis.set(title=f"{name}: three times the training time", xlabel="x", ylabel="y", xlim=(-2.5, 2.5), ylim=(-3, 3))
    axes[0].set(xlabel="x; the curve is grey, the learnt one red, true paths blue")
    figure.savefig(path, dpi=120)


def experiment(seed, epochs, quick):
    """Trains the models. Returns the errors of each, the share of the right side, and what is drawn."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    start = rng.uniform(-1.5, 1.5, (TRAIN + TEST, 2)).astype("float32")
    truth = Switching(Regimes(MATRICES, SHIFTS), Side(keras.layers.Lambda(true_side)), LONG)
    true = model_of(truth).predict(start, batch_size=TRAIN, verbose=0)
    samples = np.concatenate([start[:TRAIN, None], true[:TRAIN, : len(TIMES)]], axis=1)
    samples = samples + NOISE * rng.normal(size=samples.shape)
    # Every sample is the start of a short path.
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW + 1, axis=1).astype("float32")
    windows = windows.reshape(-1, 2, WINDOW + 1).swapaxes(1, 2)

    roughly = [x * rng.uniform(0.8, 1.2, x.shape) for x in (MATRICES, SHIFTS)]
    field, side, plain = Regimes(*roughly), Side(mlp(24, 1)), mlp(32, 2)
    models = {
        "neural event function": lambda times: Switching(field, side, times),
        "plain neural ODE": lambda times: Paths(plain, times),
    }
    if quick:
        del models["plain neural ODE"]
    errors, predicted = {}, {}
    for name, layer in models.items():
        model = model_of(layer(TIMES[:WINDOW]))
        rate = keras.optimizers.schedules.CosineDecay(1e-2, epochs * len(windows) // BATCH)
        model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), finite_paths, jit_compile=not quick)
        model.fit(windows[:, 0], windows[:, 1:], BATCH, epochs, verbose=0)
        longer = model_of(layer(LONG))
        longer.compile(jit_compile=not quick)  # in an XLA program, a path that fails is NaN and raises nothing
        predicted[name] = longer.predict(start[TRAIN:], batch_size=TEST, verbose=0)
        square = (predicted[name] - true[TRAIN:]) ** 2
        errors[name] = np.nanmean(square[:, : len(TIMES)]), np.nanmean(square), model.count_params()
    flat = rng.uniform(-1.5, 1.5, (10_000, 2)).astype("float32")
    same = np.mean((ops.convert_to_numpy(side(flat)) > 0) == (true_side(flat) > 0))
    return errors, 100 * max(same, 1 - same), (start[TRAIN:], true[TRAIN:], predicted, side)


def spread(values, digits):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def main():
    """Runs the experiment with every seed, prints the errors and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train one model for a few seconds only, with one seed")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds, and the one of the picture")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("switching.png"))
    options = parser.parse_args()
    epochs, seeds = (1, 1) if options.quick else (options.epochs, options.seeds)

    began = time.perf_counter()
    runs = [experiment(options.seed + i, epochs, options.quick) for i in range(seeds)]
    all_errors, shares, pictures = zip(*runs, strict=True)
    print(f"{seeds} seed{'s' if seeds > 1 else ''}")
    print(f"{'test error (MSE)':24}{'t < 3':>18}{'t < 9':>18}{'weights':>10}")
    for name in all_errors[0]:
        short, long, weights = zip(*(errors[name] for errors in all_errors), strict=True)
        print(f"{name:24}{spread(short, 4):>18}{spread(long, 4):>18}{weights[0]:10d}")
    print(f"variance of the paths: {np.var(pictures[0][1]):.3f}; of the noise: {NOISE**2:.4f}")
    print(f"share of the square that the learnt curve puts on the right side: {spread(shares, 1)} %")
    print(f"{time.perf_counter() - began:.0f} seconds")
    draw(options.out, *pictures[0])
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
