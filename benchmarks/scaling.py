"""Measures how the time of a training step grows with the problem, and how many evaluations the seminorm saves.

    python benchmarks/scaling.py

Draws scaling.png: the time of a training step under XLA against the batch, the width, and the numbers of steps, times
and layers. A dotted line shows proportional growth (for the width: growth with its square, like the weights). Prints
the number of evaluations in a solve of the adjoint for coupled pendulums, T = 10. One norm includes the error of the
gradient with respect to the weights, and the other (the seminorm) does not.
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import keras_node
from keras_node.metrics import SolverMetrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "batch": ("batch", [32, 128, 512, 2048]),
    "width": ("width", [8, 32, 128, 512]),
    "steps": ("number of Runge-Kutta steps", [10, 40, 160, 640]),
    "times": ("number of requested times", [2, 16, 128, 1024]),
    "depth": ("number of layers of the field", [1, 2, 4, 8, 16]),
}


def training_step(gradient, batch=128, width=32, steps=40, times=2, depth=1):
    """Returns a compiled step with a dense field. The number of Runge-Kutta steps does not depend on that of times."""
    layers = [keras.layers.Dense(width, activation="tanh") for _ in range(depth)]
    field = keras.Sequential([keras.Input((width,)), *layers])
    solver = keras_node.RungeKutta("rk4", step_size=1.0 / steps)
    y0, ts = tf.random.normal((batch, width), seed=0), np.linspace(0, 1, times, dtype="float32")

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            solution = keras_node.odeint(field, y0, ts, solver=solver, gradient=gradient)
            loss = tf.reduce_mean(solution.ys**2)
        return tape.gradient(loss, field.trainable_variables)

    return step


def least_time(step, rounds) -> float:
    """Returns the least time of a step in milliseconds."""
    step()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()[0].numpy()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def draw(path, rounds) -> None:
    """Measures and draws one panel for each size that grows."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.6), layout="constrained")
    for ax, (name, (label, values)) in zip(axes, PANELS.items(), strict=True):
        for gradient in ("backsolve", "checkpointed"):
            least = [least_time(training_step(gradient, **{name: value}), rounds) for value in values]
            ax.loglog(values, least, "o-", label=gradient)
            print(f"{name} {values}, {gradient}: " + ", ".join(f"{t:.2f}" for t in least) + " ms", flush=True)
        limits, power = ax.get_ylim(), 2 if name == "width" else 1
        ax.loglog(
            values, [max(least) * (v / values[-1]) ** power for v in values], ":", color="0.5", label="proportional"
        )
        ax.set(xlabel=label, ylim=limits)
    axes[0].set_ylabel("least time of a training step in ms")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def backward_evaluations(norm: str, rtol: float) -> float:
    """Returns the evaluations of a solve of the adjoint for coupled pendulums, with a network in the field."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(n, activation=a, dtype="float64") for n, a in ((200, "tanh"), (200, "tanh"), (2, None))
    ]
    network = keras.Sequential([keras.Input((4,), dtype="float64"), *layers])

    def field(y):
        angles, speeds = y[:, :2], y[:, 2:]
        spring = 0.5 * (angles - angles[:, ::-1])
        return tf.concat([speeds, network(y) - tf.sin(angles) - spring], axis=-1)

    y0 = tf.constant(np.random.default_rng(0).uniform(-1, 1, (32, 4)))
    solver = keras_node.RungeKutta("dopri5", rtol=rtol, atol=1e-3 * rtol)
    gradient = keras_node.BacksolveAdjoint(norm=norm)
    statistics = SolverMetrics("pendulums", backward=True, solver=solver)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            solution = keras_node.odeint(
                field,
                y0,
                [0.0, 10.0],
                solver=solver,
                gradient=gradient,
                training=True,
                jit_compile=False,
                statistics=statistics,
            )
            loss = tf.reduce_sum(solution.ys[-1] ** 2)
        return tape.gradient(loss, network.trainable_variables)

    step()
    return next(float(m.result()) for m in statistics.metrics if m.kind == "backward_evaluations")


def main() -> None:
    """Counts the evaluations, then draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    for rtol in (1e-3, 1e-5, 1e-7):
        full, state = (backward_evaluations(norm, rtol) for norm in ("full", "state"))
        less = f"{1 - state / full:.0%}"
        print(f"rtol {rtol:.0e}: {full:.0f} backward evaluations, by the seminorm {state:.0f}, {less} less", flush=True)
    draw(options.out, options.rounds)


if __name__ == "__main__":
    main()
