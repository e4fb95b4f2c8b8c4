"""Runs one library in a separate process, and answers requests on standard input with lines of JSON.

    python worker.py LIBRARY < requests

A library is a module in `libraries` with `METHODS` and `make(case, arrays, method)`. `make` returns a function without
arguments, which computes one step. This function returns the gradients (of `y0`, then of the weights; an empty list if
the case has none), the last state, and the number of evaluations or `None`. `make` raises `NotImplementedError` if a
method cannot run a case.
"""

import dataclasses
import importlib
import json
import os
import sys
import time

import numpy as np
from cases import CASES, COUNTED, CURVES, reference_of


def main() -> None:
    """Answers requests until the input ends."""
    # The output of a library must not appear between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library = importlib.import_module(f"libraries.{sys.argv[1]}")
    cases = {case.name: case for case in CASES + CURVES + COUNTED}
    cases |= {f"reference of {name}": reference_of(case) for name, case in cases.items()}
    cases |= {f"joint steps of {case.name}": dataclasses.replace(case, per_sample=False) for case in COUNTED}
    steps = {}

    def load(case, method):
        """Makes a step, runs it once and returns its results."""
        step = library.make(case, case.arrays(), method)
        results = step()
        steps[case.name, method] = step
        return results

    print(json.dumps({"methods": library.METHODS, "versions": library.versions()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        case, method = cases[request["case"]], request["method"]
        try:
            if request["do"] == "load":
                start = time.perf_counter()
                gradients, y1, evaluations = load(case, method)
                answer = {"seconds": time.perf_counter() - start}
                answer["evaluations"] = None if evaluations is None else float(evaluations)
                if "out" in request:
                    np.savez(request["out"], y1=y1, **{f"g{i}": g for i, g in enumerate(gradients)})
            else:
                if (case.name, method) not in steps:  # this process was started again
                    load(case, method)
                seconds = []
                for _ in range(request["repeat"]):
                    start = time.perf_counter()
                    steps[case.name, method]()
                    seconds.append(time.perf_counter() - start)
                answer = {"seconds": seconds}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
