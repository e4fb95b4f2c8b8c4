"""The cases of the benchmarks: the same fields, weights, data and tolerances for every library, as NumPy arrays."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A solve and, in a training step, the gradient of `mean(ys[-1] ** 2)`, or of the mean over all times.

    Attributes:
        name: the name in the table.
        kind: the field: `mlp`, `conv`, `linear` or `van_der_pol`; or `ode_rnn`, a recurrent network whose state follows
            an MLP between observations.
        sizes: the shape of the state, followed by the number of hidden units for an MLP. For an ODE-RNN: the batch, the
            number of features, the number of units, and the number of hidden units of its field.
        rtol: relative and absolute tolerance.
        num_times: the number of times of the solution, including the first; or the number of observations.
        t1: the last time.
        per_sample: whether each sample has separate steps, if the library can do that.
        dtype: the dtype of all arrays.
        gradient: whether to measure a training step, or only the solve.
        mu: the parameter of Van der Pol's oscillator, for the first and the last sample.
        start: the initial states of the oscillator: `near` one state, at `random`, or spread over one `cycle`.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    rtol: float
    num_times: int = 2
    t1: float = 1.0
    per_sample: bool = False
    dtype: str = "float32"
    gradient: bool = True
    mu: tuple[float, float] = (1.0, 25.0)
    start: str = "near"

    @property
    def unstable_backwards(self) -> bool:
        """Whether the field contracts so strongly that a solve backward in time does not end."""
        return self.kind == "van_der_pol"

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the initial state `y0`, the times `ts` and the weights `w0`, `w1` and so on.

        For an ODE-RNN, `y0` are the observations and `ts` their times. The weights of the cell have the form of Keras.
        """
        rng = np.random.default_rng(0)
        ts = np.linspace(0, self.t1, self.num_times)
        if self.kind == "van_der_pol":
            batch = self.sizes[0]
            y0 = {"near": near, "random": random, "cycle": cycle}[self.start](rng, batch, self.mu[0])
            weights = [np.linspace(*self.mu, batch)]
        elif self.kind == "linear":
            batch, width = self.sizes
            y0 = rng.normal(size=(batch, width))
            skew = rng.normal(size=(width, width))
            weights = [(skew - skew.T) / np.sqrt(width) * 2 - 0.1 * np.eye(width)]
        elif self.kind == "conv":
            channels = self.sizes[-1]
            y0 = rng.normal(size=self.sizes)
            weights = [rng.normal(size=(3, 3, channels, channels)) * 1.5 / np.sqrt(9 * channels) for _ in range(2)]
        elif self.kind == "ode_rnn":
            batch, features, units, hidden = self.sizes
            y0 = rng.normal(size=(batch, self.num_times, features))
            ts = np.sort(rng.uniform(0, self.t1, (batch, self.num_times)), axis=1)
            kernel, recurrent = (rng.normal(size=(n, 3 * units)) / np.sqrt(n) for n in (features, units))
            weights = [*dense(rng, units, hidden, scale=1), kernel, recurrent, 0.1 * rng.normal(size=(2, 3 * units))]
        else:
            batch, width, hidden = self.sizes
            y0 = rng.normal(size=(batch, width))
            weights = dense(rng, width, hidden)
        arrays = {"y0": y0, "ts": ts} | {f"w{i}": w for i, w in enumerate(weights)}
        return {name: array.astype(self.dtype) for name, array in arrays.items()}


def dense(rng, width, hidden, scale=3) -> list[np.ndarray]:
    """Draws the weights of an MLP field."""
    w1 = scale * rng.normal(size=(width, hidden)) / np.sqrt(width)
    w2 = scale * rng.normal(size=(hidden, width)) / np.sqrt(hidden)
    return [w1, np.zeros(hidden), w2, np.zeros(width)]


def near(rng, batch, mu):
    """Draws states of an oscillator near its turning point."""
    del mu
    return np.stack([2.0 + 0.1 * rng.normal(size=batch), np.zeros(batch)], axis=-1)


def random(rng, batch, mu):
    """Draws normally distributed states."""
    del mu
    return rng.normal(size=(batch, 2))


def cycle(rng, batch, mu, dt=1e-3):
    """Returns states at even time intervals over one cycle of an oscillator that has settled on it."""
    del rng
    y, v, path, turns = 2.0, 0.0, [], []
    while len(turns) < 3:
        before, points = y, []
        for c in (0.0, 0.5, 0.5, 1.0):  # the classical Runge-Kutta method, in which each stage uses the one before
            a, b = (y + c * dt * points[-1][0], v + c * dt * points[-1][1]) if points else (y, v)
            points.append((b, mu * (1 - a * a) * b - a))
        y, v = np.array([y, v]) + dt / 6 * (np.array([1, 2, 2, 1]) @ np.array(points))
        path.append((y, v))
        if before < 0 <= y:
            turns.append(len(path))
    return np.array(path)[np.linspace(turns[1], turns[2], batch, endpoint=False).astype(int)]


SIZES = [(128, 2, 50), (128, 64, 128), (512, 128, 256)]


def mlp(sizes, rtol, **options) -> Case:
    """Returns a case with an MLP field."""
    batch, width, hidden = sizes
    name = f"MLP {batch} x {width}, {hidden} hidden, {options.get('dtype', 'float32')}, {rtol:.0e}"
    return Case(name if options.get("gradient", True) else f"{name}, forward only", "mlp", sizes, rtol, **options)


OWN_STEPS = Case("Van der Pol, own steps, 1e-05", "van_der_pol", (256,), 1e-5, t1=10.0, per_sample=True)
CASES = [
    *[mlp(sizes, rtol) for sizes in SIZES for rtol in (1e-3, 1e-5)],
    mlp(SIZES[1], 1e-8, dtype="float64"),
    Case("linear, 100 times, 1e-05", "linear", (128, 16), 1e-5, num_times=100, t1=5.0),
    Case("convolutions 32 x 16 x 16 x 32, 1e-03", "conv", (32, 16, 16, 32), 1e-3),
    OWN_STEPS,
    Case("ODE-RNN, 100 observations, 1e-03", "ode_rnn", (64, 4, 32, 64), 1e-3, num_times=100, t1=10.0),
    *[mlp(sizes, 1e-5, gradient=False) for sizes in SIZES],
    dataclasses.replace(OWN_STEPS, name=f"{OWN_STEPS.name}, forward only", gradient=False),
]
QUICK = CASES[:1]
# The cases in the picture of error against time.
CURVES = [mlp(sizes, rtol, dtype="float64") for sizes in SIZES[:2] for rtol in (1e-2, 1e-4, 1e-6, 1e-8)]


def counted(name, **options) -> Case:
    """Returns a case in which steps are counted instead of timed. 26.83 is a period at `mu = 15`."""
    options = {"mu": (15.0, 15.0), "t1": 26.83} | options
    return Case(name, "van_der_pol", (256,), 1e-5, per_sample=True, dtype="float64", gradient=False, **options)


COUNTED = [
    counted("mu = 15, one cycle, phases spread over it", start="cycle"),
    counted("mu = 15, T = 10, phases spread over the cycle", start="cycle", t1=10.0),
    counted("mu = 15, T = 10, random states", start="random", t1=10.0),
    counted("mu from 1 to 25, T = 10, near one state", mu=(1.0, 25.0), t1=10.0),
]


def reference_of(case: Case) -> Case:
    """Returns the same case in float64, with much tighter tolerances, so that it is nearly exact in comparison."""
    return dataclasses.replace(case, rtol=max(1e-11, 1e-4 * case.rtol), dtype="float64")
