"""Draws error against time: training steps of every library at four tolerances.

In such a picture a library cannot win by being less accurate.

    make bench-more   # runs this and other benchmarks
"""

import pathlib
import tempfile

import matplotlib
from cases import CURVES
from compare import compare, parser, start_workers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# For each library, the fastest whole steps with a gradient.
SHOWN = {
    "ours backsolve": "keras_node, backsolve",
    "ours checkpointed": "keras_node, checkpointed",
    "jax recursive checkpoints": "diffrax, recursive checkpoints",
    "jax backsolve": "diffrax, backsolve",
    "pytorch torchdiffeq adjoint": "torchdiffeq, adjoint",
    "pytorch torchode": "torchode",
    "tfp adjoint": "TensorFlow Probability",
}


def main() -> None:
    """Times the cases and draws the picture."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    workers = start_workers(options)
    panels = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CURVES:
            print(case.name, flush=True)
            panels.setdefault(case.sizes, []).append(compare(case, workers, options.rounds, options.budget, folder)[0])
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 5.2), layout="constrained", squeeze=False)
    for ax, (sizes, runs) in zip(axes[0], panels.items(), strict=True):
        for name, label in SHOWN.items():
            rows = [row for run in runs for row in run if f"{row.library} {row.method}" == name]
            ax.loglog(
                [1e3 * row.least for row in rows],
                [row.gradient_error for row in rows],
                "o-" if name.startswith("ours") else ".--",
                label=label,
            )
        batch, width, hidden = sizes
        ax.set(title=f"MLP, {batch} x {width}, {hidden} hidden, float64", xlabel="least time of a training step in ms")
    axes[0][0].set_ylabel("relative error of the gradient")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    out = options.out or pathlib.Path(__file__).with_suffix(".png")
    figure.savefig(out, dpi=120)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
