"""Compares training steps of this project and of similar libraries, with the same weights, data and tolerances.

    make bench                                  # creates the environments and runs this
    python benchmarks/compare.py --quick        # one case, for a first look

Each library runs in a separate process. The libraries take turns, so that other work on the machine affects all of them
equally. Before that, all results are checked against a solve in float64 with tight tolerances. The script writes
comparison.md. RESULTS.md keeps these and other measurements.
"""

import argparse
import datetime
import os
import pathlib
import platform
import tempfile
import time

import numpy as np
from cases import CASES, QUICK
from processes import HERE, Worker
from report import Row, table, targets


def reference(case, worker, folder):
    """Computes the last state and the gradients in float64 with tight tolerances."""
    out = f"{folder}/reference.npz"
    answer = worker.ask(limit=600, do="load", case=f"reference of {case.name}", method="reference", out=out)
    if "error" in answer:
        raise RuntimeError(f"no reference of {case.name}: {answer['error']}")
    return np.load(out)


def distance(a, b) -> float:
    """Returns the relative error of all arrays together."""
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)) / sum(np.sum(y**2) for y in b)))


def load(case, worker, method, exact, folder) -> Row:
    """Runs a method on a case and checks its results. The row has no times yet."""
    answer = worker.ask(do="load", case=case.name, method=method, out=f"{folder}/result.npz")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    result = np.load(f"{folder}/result.npz")
    names = [n for n in exact.files if n.startswith("g")]
    errors = [distance([result["y1"]], [exact["y1"]]), 0.0]
    if names:
        errors[1] = distance([result[n] for n in names], [exact[n] for n in names])
    # Local errors of one tolerance grow during the solve. If the error is larger than this, it is another problem.
    if method != "floor" and not (errors[0] < 50 * case.rtol and errors[1] < 500 * case.rtol):
        raise RuntimeError(f"disagrees, errors {errors[0]:.0e} of the state and {errors[1]:.0e} of the gradient")
    return Row(worker.library, method, answer["evaluations"], answer["seconds"], *errors, [])


def compare(case, workers, rounds, budget, folder) -> tuple[list[Row], list[str]]:
    """Runs a case in every library, checks the results and times the steps in turn.

    Returns the rows, and notes on methods without a row.
    """
    exact = reference(case, workers[0], folder)
    rows, notes = [], []

    def note(worker, method, text):
        if not text.startswith("NotImplementedError"):
            notes.append(f"{worker.library} {method}: {text}")
            print(f"  {notes[-1]}", flush=True)

    for worker in workers:
        for method in worker.methods:
            try:
                row = load(case, worker, method, exact, folder)
            except RuntimeError as error:
                note(worker, method, str(error))
                continue
            # A warm-up step. Its time counts only if this step alone takes a large part of the budget.
            answer = worker.ask(do="time", case=case.name, method=method, repeat=1)
            if "error" in answer:
                note(worker, method, answer["error"])
                continue
            once = answer["seconds"][0]
            row.seconds += [once] if once > 0.2 * budget else []
            # A turn takes about a tenth of a second, and there are as many turns as fit into the budget.
            repeat = int(np.clip(0.1 / once, 1, 20))
            turns = int(np.clip(budget / (repeat * once), 0 if row.seconds else 1, rounds))
            rows.append((worker, row, repeat, turns))
    for turn in range(rounds):
        for worker, row, repeat, turns in rows:
            if turn < turns:
                answer = worker.ask(do="time", case=case.name, method=row.method, repeat=repeat)
                row.seconds += answer.get("seconds", [])
    for worker, row, *_ in rows:
        if not row.seconds:
            note(worker, row.method, "no step in time")
    return [row for _, row, *_ in rows if row.seconds], notes


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of all comparisons with other libraries."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rounds", type=int, default=10)
    result.add_argument("--limit", type=float, default=60, help="time limit for one answer of a library, in seconds")
    result.add_argument(
        "--budget", type=float, default=10, help="time for the timed steps of one method on one case, in seconds"
    )
    result.add_argument("--python", default="python", help="interpreter with keras_node and TensorFlow Probability")
    result.add_argument(
        "--torch-python", help="interpreter with torchdiffeq and torchode; without it, these are left out"
    )
    result.add_argument("--jax-python", help="interpreter with diffrax; without it, diffrax is left out")
    result.add_argument("--out", type=pathlib.Path, help="file for the results; by default next to this script")
    return result


def start_workers(options) -> list[Worker]:
    """Starts a process for each library, ours first."""
    pythons = [
        (options.python, "ours"),
        (options.jax_python, "jax"),
        (options.torch_python, "pytorch"),
        (options.python, "tfp"),
    ]
    return [Worker(python, library, options.limit) for python, library in pythons if python]


def main() -> None:
    """Runs the cases and writes the results."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument(
        "--quick", action="store_true", help="one case, few rounds; writes no file unless you pass --out"
    )
    arguments.add_argument("--minutes", type=float, default=25, help="time after which no further case begins")
    arguments.add_argument("--cases", default="", help="run only the cases whose name contains this text")
    options = arguments.parse_args()
    workers = start_workers(options)
    cases = [case for case in (QUICK if options.quick else CASES) if options.cases in case.name]
    results, left_out = {}, []
    rounds, start = 2 if options.quick else options.rounds, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if time.perf_counter() - start > 60 * options.minutes:
                left_out.append(case.name)
                continue
            print(case.name, flush=True)
            results[case] = compare(case, workers, rounds, options.budget, folder)
            print("\n".join(table(case, *results[case])), flush=True)
    versions = {"python": platform.python_version()} | {k: v for w in workers for k, v in w.versions.items()}
    minutes = (time.perf_counter() - start) / 60
    text = [
        "# Results",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        f"Made by `make bench`, with at most {rounds} rounds, in {minutes:.0f} minutes. A step is a solve and its",
        "gradient with respect to the initial state and the weights, or only the solve if the case says so.",
        '"ours backsolve" and "ours checkpointed" are whole steps under XLA. "ours graph" is a step without XLA, and',
        '"ours default" is what `fit` does on a CPU. Errors are relative, compared with a solve in float64 at a',
        "ten-thousandth of the tolerance, but at least 1e-11. Steps are timed in turn. Ratios are those of the least",
        "times, because other work on the machine disturbs them least.",
        "",
        *(
            [f"Left out because the time was over (--minutes {options.minutes:.0f}): {'; '.join(left_out)}.", ""]
            if left_out
            else []
        ),
        *targets(results),
        "",
        *(line for case, result in results.items() for line in table(case, *result)),
    ]
    print("\n".join(targets(results)))
    if out := options.out or (None if options.quick else HERE / "comparison.md"):
        out.write_text("\n".join(text))
        print(f"written: {out}")


if __name__ == "__main__":
    main()
