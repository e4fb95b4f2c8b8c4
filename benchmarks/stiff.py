"""Times stiff solves of batches, and their gradients, beside diffrax and SciPy, at several tolerances.

    python benchmarks/stiff.py --jax-python .venv-jax/bin/python

Every problem of a batch is Robertson's, to time 40, with rate constants of its own. Each row gives the largest relative
error of the result and the least time of a forward solve and of a training step. Libraries run one after the other, in
separate processes, so times compare within a run on a quiet machine.
"""

import argparse
import os
import subprocess
import sys
import time

import numpy as np

TOLERANCES = (1e-3, 1e-5, 1e-7)
BATCHES = (1, 32, 1024)
ATOL = np.array([1e-3, 1e-8, 1e-3])  # multiplied by rtol
END = 40.0


def constants(batch: int) -> np.ndarray:
    """Returns the rate constants of each problem, `(batch, 3)`."""
    return np.array([0.04, 3e7, 1e4]) * np.exp(0.3 * np.random.default_rng(0).normal(size=(batch, 3)))


def least(function, *arguments) -> float:
    """Returns the least time of a call in seconds, after a first call."""
    np.asarray(function(*arguments))
    seconds, start = [], time.perf_counter()
    while not seconds or (time.perf_counter() - start < 2 and len(seconds) < 50):
        begin = time.perf_counter()
        np.asarray(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def scipy_reference(k: np.ndarray) -> np.ndarray:
    """Returns the states at the end, `(batch, 3)`, with tight tolerances."""
    from scipy.integrate import solve_ivp

    return np.array([solve_scipy(solve_ivp, row, "Radau", 1e-11) for row in k])


def solve_scipy(solve_ivp, k, method, rtol):
    """Returns the state of one problem at the end."""

    def field(t, y):
        r = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
        return [-r[0] + r[2], r[0] - r[1] - r[2], r[1]]

    return solve_ivp(field, (0, END), [1.0, 0, 0], method, rtol=rtol, atol=rtol * ATOL).y[:, -1]


def ours(batch: int):
    """Yields `(method, rtol, solve, step)`."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    import keras_node

    def field(t, y, k):
        (a, b, c), (k1, k2, k3) = tf.unstack(y, axis=1), tf.unstack(k, axis=1)
        r1, r2, r3 = k1 * a, k2 * b * b, k3 * b * c
        return tf.stack([-r1 + r3, r1 - r2 - r3, r2], axis=1)

    y0 = tf.constant([[1.0, 0, 0]] * batch, tf.float64)
    for method in ("kvaerno3", "esdirk43", "esdirk54"):
        for rtol in TOLERANCES:
            solver = keras_node.RungeKutta(method, rtol=rtol, atol=rtol * ATOL, per_sample=True)

            @tf.function(jit_compile=True)
            def solve(k, solver=solver):
                return keras_node.odeint(field, y0, [0.0, END], args=k, solver=solver, throw=False).ys[-1]

            @tf.function(jit_compile=True)
            def step(k, solver=solver):
                with tf.GradientTape() as tape:
                    tape.watch(k)
                    ys = keras_node.odeint(field, y0, [0.0, END], args=k, solver=solver, throw=False).ys
                    loss = tf.reduce_sum(ys[-1] ** 2)
                return tape.gradient(loss, k)

            yield method, rtol, lambda k, solve=solve: solve(tf.constant(k)), lambda k, step=step: step(tf.constant(k))


def diffrax(batch: int):
    """Yields `(method, rtol, solve, step)`."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import diffrax
    import jax.numpy as jnp

    def field(t, y, k):
        a, b, c = y
        r1, r2, r3 = k[0] * a, k[1] * b * b, k[2] * b * c
        return jnp.stack([-r1 + r3, r1 - r2 - r3, r2])

    for method in (diffrax.Kvaerno3, diffrax.Kvaerno5):
        for rtol in TOLERANCES:
            controller = diffrax.PIDController(rtol=rtol, atol=rtol * ATOL)

            def one(k, method=method, controller=controller):
                solution = diffrax.diffeqsolve(
                    diffrax.ODETerm(field), method(), 0.0, END, None, jnp.array([1.0, 0, 0]), k,
                    stepsize_controller=controller, saveat=diffrax.SaveAt(t1=True),
                )  # fmt: skip
                return solution.ys[0]

            solve = jax.jit(jax.vmap(one))
            step = jax.jit(jax.grad(lambda k, one=one: jnp.sum(jax.vmap(one)(k) ** 2)))
            yield method.__name__, rtol, solve, step


def scipy(batch: int):
    """Yields `(method, rtol, solve, None)` for a single problem."""
    from scipy.integrate import solve_ivp

    for method in ("Radau", "BDF") if batch == 1 else ():
        for rtol in TOLERANCES:
            yield method, rtol, lambda k, m=method, r=rtol: solve_scipy(solve_ivp, k[0], m, r)[None], None


def main() -> None:
    """Runs all libraries, each in a separate process, or only one of them."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--jax-python", help="interpreter with diffrax; without it, diffrax is left out")
    arguments.add_argument("--library", choices=["ours", "diffrax", "scipy"], help="run this one in this process")
    options = arguments.parse_args()
    if options.library is None:
        print(
            "| library | method | batch | rtol | error | forward ms | step ms |\n| --- " + "| --- " * 6 + "|",
            flush=True,
        )
        for library in ("ours", "diffrax", "scipy"):
            python = options.jax_python if library == "diffrax" else sys.executable
            if python:
                subprocess.run([python, __file__, "--library", library], check=True)
        return
    for batch in BATCHES:
        k = constants(batch)
        checked = min(batch, 32)
        exact = scipy_reference(k[:checked])
        for method, rtol, solve, step in globals()[options.library](batch):
            error = np.max(np.abs(np.asarray(solve(k))[:checked] / exact - 1))
            times = [1e3 * least(f, k) if f else float("nan") for f in (solve, step)]
            row = f"| {options.library} | {method} | {batch} | {rtol:.0e} | {error:.0e} "
            row += f"| {times[0]:.2f} | {times[1]:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
