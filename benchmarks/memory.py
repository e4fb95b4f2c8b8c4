"""Measures the peak memory and the time of a gradient against the number of steps, for every gradient method.

Each point is measured in a separate process. It is the growth of the peak resident set while one gradient of `n` Euler
steps is computed in a graph, for a state of 128 KiB. The time is that of the same computation once more.

    python benchmarks/memory.py            # prints a table and draws memory.png; three minutes on two cores
    python benchmarks/memory.py --quick    # up to 100 steps
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import time

GRADIENTS = ("backsolve", "reversible", "checkpointed", "direct")
STEPS = (10, 100, 1000, 10_000)
STATE = 32 * 1024  # float32 numbers: 128 KiB


def measure(gradient: str, steps: int) -> tuple[float, float]:
    """Returns the growth of the peak memory of this process while a gradient is computed, in MiB, and the seconds."""
    import tensorflow as tf

    import keras_node

    def compute(gradient, steps):
        solver = keras_node.RungeKutta("euler", step_size=1 / steps, max_steps=steps + 1)

        @tf.function
        def function(y0):
            with tf.GradientTape() as tape:
                tape.watch(y0)
                y1 = keras_node.odeint(lambda y: -tf.tanh(y), y0, [0.0, 1.0], gradient=gradient, solver=solver).ys[-1]
            return tape.gradient(y1, y0)

        return function

    # The first run of any function takes memory that does not belong to the gradient.
    compute("direct", 1)(tf.ones((8,)))
    y0 = tf.ones((STATE,))
    function = compute(gradient, steps).get_concrete_function(y0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(y0).numpy()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    start = time.perf_counter()
    function(y0).numpy()
    return memory, time.perf_counter() - start


def draw(path: pathlib.Path, table: dict) -> None:
    """Draws memory against steps, with lines of the expected slopes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for gradient in GRADIENTS:
        points = [(n, memory) for (g, n), memory in table.items() if g == gradient]
        axes.loglog(*zip(*points, strict=True), "o-", label=gradient)
    steps = sorted({n for _, n in table})
    axes.loglog(steps, [2 * (n / 10) ** 0.5 for n in steps], ":", color="0.5", label=r"$\propto \sqrt{n}$")
    axes.loglog(steps, [4 * n / 10 for n in steps], "--", color="0.5", label=r"$\propto n$")
    axes.set(xlabel="steps n", ylabel="peak memory in MiB", title="Memory of one gradient, state of 128 KiB")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures every point in a separate process, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure up to 100 steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("memory.png"))
    parser.add_argument("--point", nargs=2, metavar=("GRADIENT", "STEPS"), help="measure one point in this process")
    options = parser.parse_args()
    if options.point:
        print(*measure(options.point[0], int(options.point[1])))
        return
    steps = STEPS[:2] if options.quick else STEPS
    table, seconds = {}, {}
    print(f"{'peak MiB at n =':16}" + "".join(f"{n:>10}" for n in steps))
    for gradient in GRADIENTS:
        for n in steps:
            command = [sys.executable, __file__, "--point", gradient, str(n)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            table[gradient, n], seconds[gradient, n] = map(float, result.stdout.split()[-2:])
        print(f"{gradient:16}" + "".join(f"{table[gradient, n]:10.1f}" for n in steps), flush=True)
    print(f"{'seconds':16}")
    for gradient in GRADIENTS:
        print(f"{gradient:16}" + "".join(f"{seconds[gradient, n]:10.3f}" for n in steps))
    draw(options.out, table)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
