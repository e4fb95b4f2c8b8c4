"""What is compared: the same fields, weights, data and tolerances for every library, as NumPy arrays."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A solve and, as a training step, the gradient of `mean(ys[-1] ** 2)`, or of the mean over all times.

    Attributes:
        name: what the table calls it.
        kind: the field: `mlp`, `conv`, `linear` or `van_der_pol`.
        sizes: the shape of the state and, of an MLP, the number of hidden units.
        rtol: relative and absolute tolerance.
        num_times: how many times the solution is asked for, the first included.
        t1: the last time.
        per_sample: whether every sample has steps of its own, where a library can.
        dtype: of all arrays.
        gradient: whether the step is a training step, or the solve alone.
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

    def arrays(self) -> dict[str, np.ndarray]:
        """The initial state `y0`, the times `ts` and the weights `w0`, `w1` and so on."""
        rng = np.random.default_rng(0)
        if self.kind == "van_der_pol":
            batch = self.sizes[0]
            y0 = np.stack([2.0 + 0.1 * rng.normal(size=batch), np.zeros(batch)], axis=-1)
            weights = [np.linspace(1.0, 25.0, batch)]
        elif self.kind == "linear":
            batch, width = self.sizes
            y0 = rng.normal(size=(batch, width))
            skew = rng.normal(size=(width, width))
            weights = [(skew - skew.T) / np.sqrt(width) * 2 - 0.1 * np.eye(width)]
        elif self.kind == "conv":
            channels = self.sizes[-1]
            y0 = rng.normal(size=self.sizes)
            weights = [rng.normal(size=(3, 3, channels, channels)) * 1.5 / np.sqrt(9 * channels) for _ in range(2)]
        else:
            batch, width, hidden = self.sizes
            y0 = rng.normal(size=(batch, width))
            w1 = 3 * rng.normal(size=(width, hidden)) / np.sqrt(width)
            w2 = 3 * rng.normal(size=(hidden, width)) / np.sqrt(hidden)
            weights = [w1, np.zeros(hidden), w2, np.zeros(width)]
        arrays = {"y0": y0, "ts": np.linspace(0, self.t1, self.num_times)}
        arrays |= {f"w{i}": w for i, w in enumerate(weights)}
        return {name: array.astype(self.dtype) for name, array in arrays.items()}


SIZES = [(128, 2, 50), (128, 64, 128), (512, 128, 256)]


def mlp(sizes, rtol, **options) -> Case:
    """A case of an MLP field."""
    batch, width, hidden = sizes
    name = f"MLP {batch} x {width}, {hidden} hidden, {options.get('dtype', 'float32')}, {rtol:.0e}"
    return Case(name if options.get("gradient", True) else f"{name}, forward only", "mlp", sizes, rtol, **options)


CASES = [
    *[mlp(sizes, rtol) for sizes in SIZES for rtol in (1e-3, 1e-5)],
    mlp(SIZES[1], 1e-8, dtype="float64"),
    Case("linear, 100 times, 1e-05", "linear", (128, 16), 1e-5, num_times=100, t1=5.0),
    *[mlp(sizes, 1e-5, gradient=False) for sizes in SIZES],
]
QUICK = CASES[:1]
# Minutes each: run if asked for.
SLOW = [
    Case("convolutions 32 x 16 x 16 x 32, 1e-03", "conv", (32, 16, 16, 32), 1e-3),
    Case("Van der Pol, own steps, 1e-05", "van_der_pol", (256,), 1e-5, t1=10.0, per_sample=True),
]
# For the picture of error against time.
CURVES = [mlp(sizes, rtol, dtype="float64") for sizes in SIZES[:2] for rtol in (1e-2, 1e-4, 1e-6, 1e-8)]


def reference_of(case: Case) -> Case:
    """The same in float64, at tolerances that make it next to exact."""
    return dataclasses.replace(case, rtol=1e-11, dtype="float64")
