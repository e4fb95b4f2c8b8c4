"""This project beside its peers: training steps with the same weights, data and tolerances, in one run.

    make bench                                  # makes the environments and runs this
    python benchmarks/compare.py --quick        # one case, for a first look

Every library runs in a process of its own and is asked for a step in turn, so that what else the machine does falls on
all alike. First all are held against a solve in float64 at tight tolerances. Writes comparison.md; RESULTS.md keeps
what was measured, this and more.
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
    """The last state and the gradients in float64 at tight tolerances."""
    out = f"{folder}/reference.npz"
    answer = worker.ask(limit=600, do="load", case=f"reference of {case.name}", method="reference", out=out)
    if "error" in answer:
        raise RuntimeError(f"no reference of {case.name}: {answer['error']}")
    return np.load(out)


def distance(a, b) -> float:
    """Relative error of all arrays together."""
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)) / sum(np.sum(y**2) for y in b)))


def load(case, worker, method, exact, folder) -> Row:
    """A method on a case, its results checked and no times yet."""
    answer = worker.ask(do="load", case=case.name, method=method, out=f"{folder}/result.npz")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    result = np.load(f"{folder}/result.npz")
    names = [n for n in exact.files if n.startswith("g")]
    errors = [distance([result["y1"]], [exact["y1"]]), 0.0]
    if names:
        errors[1] = distance([result[n] for n in names], [exact[n] for n in names])
    # A local error of one tolerance grows on its way; what is further off solves another problem.
    if method != "floor" and not (errors[0] < 50 * case.rtol and errors[1] < 500 * case.rtol):
        raise RuntimeError(f"disagrees, errors {errors[0]:.0e} of the state and {errors[1]:.0e} of the gradient")
    return Row(worker.library, method, answer["evaluations"], answer["seconds"], *errors, [])


def compare(case, workers, rounds, budget, folder) -> tuple[list[Row], list[str]]:
    """Load a case everywhere, check the results, and time the steps in turn; the rows, and notes on what has none."""
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
            # One that is not counted, unless it alone takes a good part of what there is.
            answer = worker.ask(do="time", case=case.name, method=method, repeat=1)
            if "error" in answer:
                note(worker, method, answer["error"])
                continue
            once = answer["seconds"][0]
            row.seconds += [once] if once > 0.2 * budget else []
            # As many steps in a turn as take about a tenth of a second, and as many turns as the budget has.
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
    """What all comparisons with other libraries are told."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rounds", type=int, default=10)
    result.add_argument("--limit", type=float, default=60, help="seconds that an answer of a library may take")
    result.add_argument("--budget", type=float, default=10, help="seconds of timed steps of a method on a case")
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
    return [Worker(python, library, options.limit) for python, library in pythons if python]


def main() -> None:
    """Run the cases and write the results."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="one case, few rounds; writes nothing unless --out")
    arguments.add_argument("--minutes", type=float, default=25, help="after which no other case is begun")
    arguments.add_argument("--cases", default="", help="only cases whose name contains this")
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
        f"Made by `make bench`, {rounds} rounds at most, in {minutes:.0f} minutes. A step is the solve and the",
        "gradient with respect to the initial state and the weights; where a case says so, the solve only.",
        '"ours backsolve" and "ours checkpointed" are whole steps under XLA, "ours graph" is without, "ours default"',
        "what `fit` does on a CPU. Errors are relative, against float64 at a ten-thousandth of the tolerance or 1e-11.",
        "Steps are timed in turn; ratios are of the least times, which other work on the machine disturbs least.",
        "",
        *(
            [f"Left out for lack of time (--minutes {options.minutes:.0f}): {'; '.join(left_out)}.", ""]
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
