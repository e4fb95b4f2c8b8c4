"""Error against time of stiff solves and their gradients, beside diffrax, TensorFlow Probability and SciPy.

    python benchmarks/stiff.py --jax-python .venv-jax/bin/python
    python benchmarks/stiff.py --problem robertson --batch 32 --out robertson.png

Each row is a method at a tolerance: the largest relative error at the end, and the least time of a forward solve and of
a training step. Libraries run one after the other, in separate processes, so times compare within a run on a quiet
machine. At the end come ratios at equal error: of each library the fastest method and tolerance that is as exact.
The picture shows error against time.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

TOLERANCES = (1e-3, 1e-5, 1e-7)
ERRORS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
CHECKED = 32  # samples of a batch
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(2, 20, 20)) / np.sqrt(20)


class Problem(NamedTuple):
    """A field `f(library, y, k)`, where `library` is NumPy, `jax.numpy` or TensorFlow, and one problem for each sample.

    `parameters(batch)` returns `k`, `(batch, ...)`. A solve goes from `start` to the time `end`; the absolute tolerance
    is `atol * rtol`.
    """

    field: callable
    parameters: callable
    start: np.ndarray
    end: float
    atol: np.ndarray
    batches: tuple


def robertson(library, y, k):
    """Three reactions of very different speed."""
    a, b, c = (y[..., i] for i in range(3))
    r1, r2, r3 = k[..., 0] * a, k[..., 1] * b * b, k[..., 2] * b * c
    return library.stack([-r1 + r3, r1 - r2 - r3, r2], axis=-1)


def van_der_pol(library, y, k):
    """An oscillator that relaxes."""
    a, b = y[..., 0], y[..., 1]
    return library.stack([b, k[..., 0] * (1 - a * a) * b - a], axis=-1)


def neural(library, y, k):
    """A network of 20 hidden units, whose 20 inputs decay at rates from 1 to 10,000."""
    return library.tanh(y @ WEIGHTS[0]) @ WEIGHTS[1] - k * y


def spread(values, amount):
    """Returns a function of the batch size: parameters that differ from sample to sample."""
    values = np.array(values)
    return lambda batch: values * np.exp(amount * np.random.default_rng(0).normal(size=(batch, len(values))))


PROBLEMS = {
    "robertson": Problem(
        robertson,
        spread([0.04, 3e7, 1e4], 0.3),
        np.array([1.0, 0, 0]),
        40.0,
        np.array([1e-3, 1e-8, 1e-3]),
        (1, 32, 1024),
    ),
    "van der pol": Problem(
        van_der_pol, spread([1000.0], 0.0), np.array([2.0, 0]), 1000.0, np.array([1e-2, 1e-5]), (1,)
    ),
    "neural": Problem(neural, spread(np.logspace(0, 4, 20), 0.3), RNG.normal(size=20), 2.0, np.full(20, 1e-3), (32,)),
}


def least(function, *arguments) -> float:
    """Returns the least time of a call in seconds, after a first call."""
    np.asarray(function(*arguments))
    seconds, start = [], time.perf_counter()
    while not seconds or (time.perf_counter() - start < 1.5 and len(seconds) < 50):
        begin = time.perf_counter()
        np.asarray(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def solve_scipy(problem, k, method, rtol):
    """Returns the state of one sample at the end."""
    from scipy.integrate import solve_ivp

    ends = (0, problem.end)
    solution = solve_ivp(
        lambda t, y: problem.field(np, y, k), ends, problem.start, method, rtol=rtol, atol=rtol * problem.atol
    )
    return solution.y[:, -1]


def keras_node(problem, batch):
    """Yields `(method, rtol, solve, step)`."""
    import tensorflow as tf

    import keras_node

    y0 = tf.constant(np.tile(problem.start, (batch, 1)))
    for method in ("kvaerno3", "esdirk43", "esdirk54"):
        for rtol in (*TOLERANCES, 1e-9) if method == "esdirk54" else TOLERANCES:
            solver = keras_node.RungeKutta(method, rtol=rtol, atol=rtol * problem.atol, per_sample=True)

            def solve(k, solver=solver):
                field = lambda t, y, k: problem.field(tf, y, k)  # noqa: E731
                ends = [0.0, problem.end]
                return keras_node.odeint(field, y0, ends, args=k, solver=solver, throw=False).ys[-1]

            def step(k, solve=solve):
                with tf.GradientTape() as tape:
                    tape.watch(k)
                    loss = tf.reduce_sum(solve(k) ** 2)
                return tape.gradient(loss, k)

            compiled = [tf.function(f, jit_compile=True) for f in (solve, step)]
            yield method, rtol, *[lambda k, f=f: f(tf.constant(k)) for f in compiled]


def diffrax(problem, batch):
    """Yields `(method, rtol, solve, step)`."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import diffrax
    import jax.numpy as jnp

    term = diffrax.ODETerm(lambda t, y, k: problem.field(jnp, y, k))
    y0, end = jnp.array(problem.start), diffrax.SaveAt(t1=True)
    for method in (diffrax.Kvaerno3, diffrax.Kvaerno5):
        for rtol in TOLERANCES:
            control = diffrax.PIDController(rtol=rtol, atol=rtol * problem.atol)

            def one(k, method=method, control=control):
                return diffrax.diffeqsolve(
                    term, method(), 0.0, problem.end, None, y0, k, stepsize_controller=control, saveat=end
                ).ys[0]

            solve = jax.jit(jax.vmap(one))
            step = jax.jit(jax.grad(lambda k, one=one: jnp.sum(jax.vmap(one)(k) ** 2)))
            yield method.__name__, rtol, solve, step


def tfp(problem, batch):
    """Yields `(method, rtol, solve, None)` for a single sample. Batches and gradients are not possible."""
    import tensorflow as tf
    import tensorflow_probability as tfp

    for rtol in TOLERANCES if batch == 1 else ():
        bdf = tfp.math.ode.BDF(rtol=rtol, atol=rtol * problem.atol)

        @tf.function
        def solve(k, bdf=bdf):
            field = lambda t, y: problem.field(tf, y, k[0])  # noqa: E731
            return bdf.solve(field, 0.0, tf.constant(problem.start), [problem.end]).states[-1:]

        yield "BDF", rtol, lambda k, solve=solve: solve(tf.constant(k)), None


def scipy(problem, batch):
    """Yields `(method, rtol, solve, None)` for a single sample."""
    for method in ("Radau", "BDF") if batch == 1 else ():
        for rtol in TOLERANCES:
            yield method, rtol, lambda k, m=method, r=rtol: solve_scipy(problem, k[0], m, r)[None], None


def measure(library, problems, batches):
    """Prints a row for each method and tolerance of a library."""
    for name in problems:
        problem = PROBLEMS[name]
        for batch in problem.batches if batches is None else batches:
            k = problem.parameters(batch)
            exact = np.array([solve_scipy(problem, row, "Radau", 1e-11) for row in k[:CHECKED]])
            scale = np.abs(exact) + 1e-3 * np.abs(exact).max(axis=0)
            for method, rtol, solve, step in globals()[library](problem, batch):
                try:
                    error = np.max(np.abs(np.asarray(solve(k))[:CHECKED] - exact) / scale)
                    times = [1e3 * least(f, k) if f else np.nan for f in (solve, step)]
                except Exception as failure:  # a library that cannot do it is reported
                    error, times = np.nan, [np.nan, np.nan]
                    print(f"{library} {method} {name}: {type(failure).__name__}", file=sys.stderr)
                print(
                    f"| {name} | {batch} | {library} | {method} | {rtol:.0e} | {error:.1e} "
                    f"| {times[0]:.3g} | {times[1]:.3g} |",
                    flush=True,
                )


class Row(NamedTuple):
    """A method at a tolerance. Times are in milliseconds."""

    problem: str
    batch: str
    library: str
    method: str
    rtol: float
    error: float
    forward: float
    step: float

    @classmethod
    def parse(cls, line):
        """Returns the row of a line of the table."""
        *names, rtol, error, forward, step = [cell.strip() for cell in line.strip("| \n").split("|")]
        return cls(*names, float(rtol), float(error), float(forward), float(step))


def time_at(rows, way, error):
    """Returns the time that the fastest method takes to be as exact, between its two nearest tolerances, or NaN."""
    times = []
    for method in dict.fromkeys(row.method for row in rows):
        points = [(np.log(row.error), np.log(getattr(row, way))) for row in rows if row.method == method]
        points = sorted(point for point in points if np.isfinite(point).all())
        if points and np.log(error) >= points[0][0]:  # beyond the loosest tolerance, its time
            times.append(np.exp(np.interp(np.log(error), *np.transpose(points))))
    return min(times, default=np.nan)


def compare(rows):
    """Prints the ratios of times at equal error, ours by those of each other library."""
    print("\n| | problem | batch | " + " | ".join(f"{e:.0e}" for e in ERRORS) + " |\n" + "| --- " * 8 + "|")
    cases = dict.fromkeys((row.problem, row.batch) for row in rows)

    def times(library, case, way):
        mine = [row for row in rows if row.library == library and (row.problem, row.batch) == case]
        return np.array([time_at(mine, way, error) for error in ERRORS])

    for library in ("diffrax", "tfp", "scipy"):
        for way in ("forward", "step"):
            ratios = np.array([times("keras_node", case, way) / times(library, case, way) for case in cases])
            for (problem, batch), row in zip(cases, ratios, strict=True):
                if np.isfinite(row).any():
                    cells = " | ".join("" if np.isnan(x) else f"{x:.2f}" for x in row)
                    print(f"| {way}, ours / {library} | {problem} | {batch} | {cells} |")
            ratios = ratios[np.isfinite(ratios)]
            if ratios.size:
                mean, most = np.exp(np.mean(np.log(ratios))), ratios.max()
                print(f"| {way}, ours / {library}: geometric mean {mean:.2f}, largest {most:.2f} |" + " |" * 7)
    one, many = (times("keras_node", ("robertson", batch), "step") for batch in ("1", "1024"))
    for error, ratio in zip(ERRORS, many / one, strict=True):
        if np.isfinite(ratio):
            print(f"a training step of 1024 problems takes {ratio:.0f} times one, at an error of {error:.0e}")


def draw(rows, path):
    """Draws error against time, forward above and training steps below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row.problem, row.batch) for row in rows))
    figure, axes = plt.subplots(2, len(cases), figsize=(3.6 * len(cases), 7), layout="constrained", squeeze=False)
    for column, (problem, batch) in zip(axes.T, cases, strict=True):
        for axis, way in zip(column, ("forward", "step"), strict=True):
            for library, method in dict.fromkeys((row.library, row.method) for row in rows):
                mine = [row for row in rows if (row.problem, row.batch) == (problem, batch)]
                mine = [row for row in mine if (row.library, row.method) == (library, method)]
                style = "o-" if library == "keras_node" else ".--"
                times, errors = [getattr(row, way) for row in mine], [row.error for row in mine]
                axis.loglog(times, errors, style, label=f"{library}, {method}")
            axis.set(xlabel=f"{'forward solve' if way == 'forward' else 'training step'}, least ms")
        column[0].set_title(f"{problem}, batch {batch}")
    for axis in axes[:, 0]:
        axis.set_ylabel("largest relative error")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def main() -> None:
    """Runs all libraries, each in a separate process, or only one of them."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--jax-python", help="interpreter with diffrax; without it, diffrax is left out")
    arguments.add_argument("--library", choices=["keras_node", "diffrax", "tfp", "scipy"], help="run only this one")
    arguments.add_argument("--problem", choices=PROBLEMS, help="only this problem")
    arguments.add_argument("--batch", type=int, help="only this batch size")
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"))
    options = arguments.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    problems = [options.problem] if options.problem else list(PROBLEMS)
    batches = None if options.batch is None else [options.batch]
    if options.library is not None:
        measure(options.library, problems, batches)
        return
    print("| problem | batch | library | method | rtol | error | forward ms | step ms |\n" + "| --- " * 8 + "|")
    sys.stdout.flush()
    rows = []
    for library in ("keras_node", "diffrax", "tfp", "scipy"):
        python = options.jax_python if library == "diffrax" else sys.executable
        if python is None:
            continue
        command = [python, __file__, "--library", library]
        command += [f"--problem={options.problem}"] if options.problem else []
        command += [f"--batch={options.batch}"] if options.batch is not None else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                rows.append(Row.parse(line))
    compare(rows)
    draw(rows, options.out)


if __name__ == "__main__":
    main()
