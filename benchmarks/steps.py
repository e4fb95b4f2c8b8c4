"""Counts the steps of samples that step separately, and of samples that share the steps of their batch.

    python benchmarks/steps.py --torch-python PYTHON --jax-python PYTHON

The problem is Van der Pol's oscillator with 256 samples and a tolerance of 1e-5 in float64. If one sample needs small
steps, all samples that share its steps must take them. The table shows attempted steps, computed from the numbers of
evaluations; for separate steps, the mean over the samples. The first setting is that of the torchode paper (Lienen &
Guennemann 2022, arXiv:2210.12375): one cycle, with initial states from the whole cycle.
"""

from cases import COUNTED
from compare import parser, start_workers

COLUMNS = {
    "joint": ("ours", "backsolve", "joint steps of "),
    "per sample": ("ours", "backsolve", ""),
    "torchode": ("pytorch", "torchode", ""),
    "diffrax, vmap": ("jax", "recursive checkpoints", ""),
    "torchdiffeq, joint": ("pytorch", "torchdiffeq", ""),
}


def main() -> None:
    """Counts the steps and prints the table."""
    workers = {worker.library: worker for worker in start_workers(parser(__doc__.splitlines()[0]).parse_args())}
    columns = {name: column for name, column in COLUMNS.items() if column[0] in workers}
    print("| steps | " + " | ".join(columns) + " | joint / per sample | per sample / torchode |")
    print("| --- | " + "--- | " * (len(columns) + 2))
    for case in COUNTED:
        steps = {}
        for name, (library, method, prefix) in columns.items():
            answer = workers[library].ask(do="load", case=prefix + case.name, method=method)
            # A step takes six evaluations, and the start takes two.
            steps[name] = (answer["evaluations"] - 2) / 6 if "evaluations" in answer else float("nan")
        ratios = [steps["joint"] / steps["per sample"], steps["per sample"] / steps.get("torchode", float("nan"))]
        cells = [f"{s:.1f}" for s in steps.values()] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
