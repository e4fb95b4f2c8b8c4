"""What an event costs: a solve with one that never comes beside the same solve without, as ratios in one run.

    python benchmarks/events.py              # a minute on two cores
    python benchmarks/events.py --rounds 5   # quicker

The cases are the MLPs of `benchmarks/cases.py`, compiled with XLA. The event function compares the sum of the state
with a level that it never reaches. Both programs run in turn, and the least time of each counts.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import keras_node

SIZES = [(128, 2, 64), (128, 64, 128), (512, 128, 256)]


def program(field, y0, event, trains):
    """A compiled solve, or a training step with it."""

    @tf.function(jit_compile=True)
    def run(y0):
        with tf.GradientTape() as tape:
            solution = keras_node.odeint(field, y0, [0.0, 1.0], event=event)
            loss = tf.reduce_mean(solution.ys[-1] ** 2)
        return tape.gradient(loss, field.trainable_variables) if trains else solution.ys[-1]

    return lambda: tf.nest.map_structure(lambda x: x.numpy(), run(y0))


def least_times(programs, rounds):
    """The least time of each program in milliseconds. They run in turn."""
    for run in programs:
        run()
    best = [float("inf")] * len(programs)
    for _ in range(rounds):
        for i, run in enumerate(programs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def main():
    """Times all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    keras.utils.set_random_seed(1)
    print("| batch x state, hidden | | without, ms | with, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for batch, size, hidden in SIZES:
        field = keras.Sequential(
            [keras.Input((size,)), keras.layers.Dense(hidden, activation="tanh"), keras.layers.Dense(size)]
        )
        y0 = tf.random.normal((batch, size))
        never = keras_node.Event(lambda t, y: tf.reduce_sum(y, axis=1) - 1e6)
        for trains in (False, True):
            plain, watched = least_times([program(field, y0, e, trains) for e in (None, never)], options.rounds)
            name = "training step" if trains else "forward"
            ratio = watched / plain
            print(f"| {batch} x {size}, {hidden} | {name} | {plain:.2f} | {watched:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
