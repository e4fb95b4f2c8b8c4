"""Runs random programs until a given number of problems is solved: `make stress STRESS_ARGS="--problems 5000"`.

A problem is an initial value problem with separate steps. A program counts as one problem, or as one problem for each
sample of its batch if the samples step separately. The script prints the number of solved problems, the time that they
took, and the smallest program of every failure. Then it makes a thousand calls each of `fit`, `predict` and `odeint`,
and prints how the memory grew. `tests/trials.py` and `tests/recurrent_trials.py` define the programs and the properties
that must hold. `RESULTS.md` has the results.
"""

import argparse
import collections
import gc
import pathlib
import random
import sys
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import keras
import recurrent_trials
import tensorflow as tf
import test_faults
import trials

import keras_node


def failures(module, program, seeds, batch):
    """Returns the number of problems and a list of failures. An exception is a failure as well."""
    keras.utils.set_random_seed(zlib.crc32(repr(program).encode()))  # a program has the same weights in every run
    try:
        return module.try_out(program, seeds, batch)
    except Exception as error:
        return 0, [f"{type(error).__name__}: {str(error)[:500]}"]


def many(program, batch):
    """Returns the number of samples to solve at once. A joint solve is one problem, for any batch."""
    return batch if program.per_sample and program.batch > 1 else None


def search(module, rng, batch, seeds):
    """Draws a program and tries it out."""
    # Samples that step separately make most of the problems, and are the most difficult.
    fixed = {"per_sample": True} if rng.random() < 0.7 else {}
    program = trials.draw(rng, module, **fixed)
    start = time.perf_counter()
    problems, wrong = failures(module, program, seeds, many(program, batch))
    if wrong:
        name = module.__name__
        print(f"\nFAILED {name}: {program}\n  " + "\n  ".join(wrong[:5]), flush=True)

        def fails(p):
            return bool(failures(module, p, seeds, None)[1])

        print(f"  smallest: {trials.smallest(program, fails, module) if fails(program) else 'only in a large batch'}")
    return program, problems, bool(wrong), time.perf_counter() - start


def main():
    """Runs until the number of problems is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument(
        "--batch", type=int, default=500, help="number of samples in a batch whose samples step separately"
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of random draws for each program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this time, even if there are fewer problems"
    )
    parser.add_argument(
        "--calls", type=int, default=1000, help="number of calls of each of `fit`, `predict` and `odeint`"
    )
    parser.add_argument("--modes", nargs="*", default=trials.OPTIONS["mode"])
    args = parser.parse_args()
    trials.OPTIONS["mode"] = recurrent_trials.OPTIONS["mode"] = tuple(args.modes)

    versions = f"keras_node {keras_node.__version__}, tensorflow {tf.__version__}, keras {keras.__version__}"
    print(f"{time.strftime('%Y-%m-%d')}, {versions}, seed {args.seed}", flush=True)
    for sentence in recurrent_trials.KNOWN:
        print(f"left out: {sentence}")
    rng, start = random.Random(args.seed), time.perf_counter()
    solved, programs, failed, drawn = collections.Counter(), collections.Counter(), 0, collections.Counter()
    while sum(solved.values()) < args.problems and time.perf_counter() - start < 60 * args.minutes:
        module = recurrent_trials if rng.random() < 0.3 else trials
        program, problems, wrong, _ = search(module, rng, args.batch, range(args.seeds))
        solved[module.__name__] += problems
        programs[module.__name__] += 1
        failed += wrong
        drawn.update((module.__name__, name, getattr(program, name)) for name in module.OPTIONS)
        if sum(programs.values()) % 10 == 0:
            minutes = (time.perf_counter() - start) / 60
            print(f"{sum(solved.values())} problems, {dict(programs)}, {failed} failed, {minutes:.1f} min", flush=True)
            keras.utils.clear_session()
            gc.collect()
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{sum(solved.values())} problems {dict(solved)} in {dict(programs)} programs")
    print(f"{failed} programs failed, {minutes:.1f} minutes")
    never = [
        f"{name}={value!r}"
        for module in (trials, recurrent_trials)
        for name, values in module.OPTIONS.items()
        for value in values
        if not drawn[module.__name__, name, value]
    ]
    print("never drawn: " + (", ".join(never) or "nothing"), flush=True)
    if args.calls:
        for name, call in test_faults.repeated_calls().items():
            memory, graphs = test_faults.growth(call, args.calls)
            print(f"{args.calls} calls of {name}: {memory / 2**20:+.1f} MiB, {graphs:+d} graphs", flush=True)
            failed += graphs > 0 or memory > args.calls * 2**15
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
