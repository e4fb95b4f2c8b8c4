"""This project beside its peers: training steps with the same weights, data and tolerances, in one run.

    make bench                                  # makes the environments and runs this
    python benchmarks/compare.py --quick        # one case, for a first look

Every library runs in a process of its own and is asked for a step in turn, so that what else the machine does falls on
all alike. First all are held against a solve in float64 at tight tolerances. Writes comparison.md; RESULTS.md keeps
what was measured, this and more.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import tempfile

import numpy as np
from cases import CASES, QUICK, SLOW

HERE = pathlib.Path(__file__).parent


class Worker:
    """A library in its process."""

    def __init__(self, python: str, library: str):
        self.library = library
        # While a process waits for its turn, its threads must not spin.
        settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
        self.process = subprocess.Popen(
            [python, HERE / "worker.py", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | settings,
        )
        hello = self.process.stdout.readline()
        if not hello:
            raise RuntimeError(f"`{python} {HERE / 'worker.py'} {library}` does not start: run it to see why")
        hello = json.loads(hello)
        self.methods, self.versions = hello["methods"], hello["versions"]

    def ask(self, **request) -> dict:
        """Send a request and wait for its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@dataclasses.dataclass
class Row:
    """A method on a case."""

    library: str
    method: str
    evaluations: float | None
    first: float
    state_error: float
    gradient_error: float
    seconds: list

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def least(self) -> float:
        """The time that the machine's other work disturbs least."""
        return float(np.min(self.seconds))


def reference(case, worker, folder):
    """The last state and the gradients in float64 at tight tolerances."""
    answer = worker.ask(do="load", case=f"reference of {case.name}", method="reference", out=f"{folder}/reference.npz")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return np.load(f"{folder}/reference.npz")


def distance(a, b) -> float:
    """Relative error of all arrays together."""
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)) / sum(np.sum(y**2) for y in b)))


def compare(case, workers, rounds, folder) -> list[Row]:
    """Load a case everywhere, check the results, and time the steps in turn."""
    exact = reference(case, workers[0], folder)
    rows = []
    for worker in workers:
        for method in worker.methods:
            answer = worker.ask(do="load", case=case.name, method=method, out=f"{folder}/result.npz")
            if "error" in answer:
                if not answer["error"].startswith("NotImplementedError"):
                    print(f"  {worker.library} {method}: {answer['error']}", flush=True)
                continue
            result = np.load(f"{folder}/result.npz")
            names = [n for n in exact.files if n.startswith("g")]
            errors = [distance([result["y1"]], [exact["y1"]]), 0.0]
            if names:
                errors[1] = distance([result[n] for n in names], [exact[n] for n in names])
            row = Row(worker.library, method, answer["evaluations"], answer["seconds"], *errors, [])
            # A local error of one tolerance grows on its way; what is further off solves another problem.
            if method != "floor" and not (row.state_error < 50 * case.rtol and row.gradient_error < 500 * case.rtol):
                print(f"  {worker.library} {method} disagrees: {errors}", flush=True)
                continue
            rows.append((worker, row))
    # As many steps in a turn as take about a tenth of a second, after one that is not counted.
    repeats = {}
    for worker, row in rows:
        once = worker.ask(do="time", case=case.name, method=row.method, repeat=2)["seconds"][-1]
        repeats[row.library, row.method] = int(np.clip(0.1 / once, 1, 20))
    for _ in range(rounds):
        for worker, row in rows:
            repeat = repeats[row.library, row.method]
            row.seconds += worker.ask(do="time", case=case.name, method=row.method, repeat=repeat)["seconds"]
    return [row for _, row in rows]


def table(case, rows) -> list[str]:
    """The rows of a case in Markdown."""
    ours = min(row.least for row in rows if row.library == "ours" and row.method in ("backsolve", "checkpointed"))
    lines = [
        f"### {case.name}",
        "",
        "| | median ms | least ms | times ours | evaluations | error of the state | of the gradient | first step s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        floor = row.method == "floor"
        evaluations = "" if row.evaluations is None else f"{row.evaluations:.0f}"
        errors = ["" if floor or not error else f"{error:.0e}" for error in (row.state_error, row.gradient_error)]
        lines.append(
            f"| {row.library} {row.method} | {1e3 * row.median:.2f} | {1e3 * row.least:.2f} "
            f"| {row.least / ours:.2f} | {evaluations} | {errors[0]} | {errors[1]} | {row.first:.1f} |"
        )
    return [*lines, ""]


def geometric_mean(values) -> float:
    """The geometric mean of ratios."""
    return float(np.exp(np.mean(np.log(values))))


def targets(results) -> list[str]:
    """Ours by theirs, over all cases, beside what was aimed at."""
    training = [rows for case, rows in results.items() if case.gradient]
    forward = [rows for case, rows in results.items() if not case.gradient]

    def ratios(of, to, cases=training, value=lambda row: row.least):
        """Of every case that has both, our value by theirs, each the best of the methods in question."""

        def best(rows, methods):
            return min((value(row) for row in rows if f"{row.library} {row.method}".startswith(methods)), default=None)

        pairs = [(best(rows, of), best(rows, to)) for rows in cases]
        return [ours / theirs for ours, theirs in pairs if ours and theirs]

    exact, ours, adjoint = ("ours backsolve", "ours checkpointed"), "ours backsolve", "pytorch torchdiffeq"
    eager = ratios("ours eager", adjoint, value=lambda row: row.least / row.evaluations)
    aims = [
        ("a training step: diffrax's fastest gradient", ratios(exact, "jax"), "largest", 1.0),
        ("diffrax's fastest gradient", ratios(exact, "jax"), "mean", 0.7),
        ("torchdiffeq's adjoint", ratios(exact, adjoint), "mean", 0.2),
        ("torchode", ratios(exact, "pytorch torchode"), "mean", 0.5),
        ("TensorFlow Probability under XLA", ratios(exact, "tfp"), "mean", 0.5),
        ("the floor (backsolve)", ratios(ours, "ours floor"), "largest", 1.15),
        ("whole-step XLA, by a compiled solve in a plain graph", ratios("ours compiled solve", ours), "largest", 1.5),
        ("diffrax's first step, by ours", ratios(ours, "jax", value=lambda row: row.first), "mean", 1.0),
        ("torchdiffeq's time per evaluation, by ours in eager mode", eager, "largest", 2.0),
        ("the solve alone: diffrax", ratios(ours, "jax", forward), None, None),
        ("torchdiffeq", ratios(ours, adjoint, forward), None, None),
        ("TensorFlow Probability under XLA", ratios(ours, "tfp", forward), None, None),
        ("the floor", ratios(ours, "ours floor", forward), None, None),
    ]
    lines = ["| our time, divided by that of | geometric mean | largest | aim | |", "| --- | --- | --- | --- | --- |"]
    for name, values, kind, aim in aims:
        if values:
            reached = max(values) if kind == "largest" else geometric_mean(values)
            verdict = "| |" if kind is None else f"| {kind} {aim} | {'met' if reached <= aim else 'missed'} |"
            lines.append(f"| {name} | {geometric_mean(values):.2f} | {max(values):.2f} {verdict}")
    return lines


def parser(description: str) -> argparse.ArgumentParser:
    """What all comparisons with other libraries are told."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rounds", type=int, default=10)
    result.add_argument("--python", default="python", help="with keras_node and TensorFlow Probability")
    result.add_argument("--torch-python", help="with torchdiffeq and torchode; left out if not given")
    result.add_argument("--jax-python", help="with diffrax; left out if not given")
    result.add_argument("--out", type=pathlib.Path, help="a file for the results; by default one beside this file")
    return result


def start_workers(options) -> list[Worker]:
    """A process for every library, ours first."""
    pythons = [
        (options.python, "ours"),
        (options.jax_python, "jax"),
        (options.torch_python, "pytorch"),
        (options.python, "tfp"),
    ]
    return [Worker(python, library) for python, library in pythons if python]


def main() -> None:
    """Run the cases and write the results."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="one case, few rounds; writes nothing unless --out")
    arguments.add_argument("--cases", default="", help="only cases whose name contains this, slow ones included")
    options = arguments.parse_args()
    workers = start_workers(options)
    cases = [case for case in CASES + SLOW if options.cases in case.name] if options.cases else CASES
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in QUICK if options.quick else cases:
            print(case.name, flush=True)
            results[case] = compare(case, workers, 2 if options.quick else options.rounds, folder)
            print("\n".join(table(case, results[case])), flush=True)
    versions = {"python": platform.python_version()} | {k: v for w in workers for k, v in w.versions.items()}
    text = [
        "# Results",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        f"Made by `make bench`, {options.rounds} rounds. A step is the solve and the gradient with respect to the",
        "initial state and the weights; where a case says so, the solve only. Errors are relative, against float64 at",
        "tolerance 1e-11. Steps are timed in turn; ratios are of the least times, which other work on the machine",
        "disturbs least.",
        "",
        *targets(results),
        "",
        *(line for case, rows in results.items() for line in table(case, rows)),
    ]
    if out := options.out or (None if options.quick else HERE / "comparison.md"):
        out.write_text("\n".join(text))
        print(f"written: {out}")


if __name__ == "__main__":
    main()
