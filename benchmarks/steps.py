"""How many steps samples take that have steps of their own, beside steps that a batch shares.

    python benchmarks/steps.py --torch-python PYTHON --jax-python PYTHON

Van der Pol's oscillator, 256 samples, tolerance 1e-5 in float64: one sample that needs small steps makes all that share
its steps take them. Attempted steps, from the numbers of evaluations; the mean over samples where they have their own.
The first setting is that of torchode's paper (Lienen & Guennemann 2022): one cycle, begun everywhere on it.
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
    """Count the steps and print the table."""
    workers = {worker.library: worker for worker in start_workers(parser(__doc__.splitlines()[0]).parse_args())}
    columns = {name: column for name, column in COLUMNS.items() if column[0] in workers}
    print("| steps | " + " | ".join(columns) + " | joint / per sample | per sample / torchode |")
    print("| --- | " + "--- | " * (len(columns) + 2))
    for case in COUNTED:
        steps = {}
        for name, (library, method, prefix) in columns.items():
            answer = workers[library].ask(do="load", case=prefix + case.name, method=method)
            # Six evaluations a step, and two at the start.
            steps[name] = (answer["evaluations"] - 2) / 6 if "evaluations" in answer else float("nan")
        ratios = [steps["joint"] / steps["per sample"], steps["per sample"] / steps.get("torchode", float("nan"))]
        cells = [f"{s:.1f}" for s in steps.values()] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
