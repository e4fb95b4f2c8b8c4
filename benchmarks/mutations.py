"""Changes one sign, comparison, constant or extremum of the numerics at a time, and prints what no test notices.

    pip install coverage
    python benchmarks/mutations.py record                 # which test runs which line: all tests, on one core
    python benchmarks/mutations.py try --sample 20        # 20 changes at random; all of them without --sample

The script changes a copy of the package, and no file of the project. For every change it runs tests that reach the
changed line: the quickest of each test function, then the second quickest of each, for about `--seconds`. If a change
survives, none of these tests needs the line, or the change makes no difference.
"""

import argparse
import ast
import bisect
import collections
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / ".mutations.json"
FILES = [
    "integrate.py",
    "loop_state.py",
    "step_size.py",
    "clock.py",
    *(f"gradients/{p.name}" for p in sorted((ROOT / "keras_node" / "gradients").glob("*.py"))),
]

SWAPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
EXTREMA = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "reduce_any": "reduce_all",
    "reduce_all": "reduce_any",
}


class Mutation(NamedTuple):
    """A replacement of the bytes `old`, from `start` to `end` of a file, by `new`."""

    file: str
    lines: range  # those of the statement, or of its head
    line: int
    start: int
    end: int
    column: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.old.strip()!r} -> {self.new!r}"


def mutations(file: str) -> list[Mutation]:
    """Returns all changes of a file, in the order of its lines. Annotations are left alone."""
    source = (ROOT / "keras_node" / file).read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data, found = source.encode(), []

    def begin(node):
        return starts[node.lineno - 1] + node.col_offset

    def end(node):
        return starts[node.end_lineno - 1] + node.end_col_offset

    def visit(node, lines):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            lines = range(node.lineno, (body[0].lineno if body else node.end_lineno + 1))

        def add(start, end, new):
            line = node.lineno
            column = start - starts[bisect.bisect_right(starts, start) - 1]
            found.append(Mutation(file, lines, line, start, end, column, data[start:end].decode(), new))

        def between(left, right, operator):
            """Adds a change of the operator between two operands. The syntax tree does not hold its position."""
            old, new = SWAPS.get(type(operator), (None, None))
            text = data[end(left) : begin(right)].decode()
            if old is not None and old in text:
                place = end(left) + len(text[: text.index(old)].encode())
                add(place, place + len(old), new)

        if isinstance(node, ast.BinOp):
            between(node.left, node.right, node.op)
        elif isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                between(left, right, operator)
        elif isinstance(node, ast.BoolOp):
            between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
            add(begin(node), begin(node) + (3 if isinstance(node.op, ast.Not) else 1), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            add(begin(node), end(node), repr(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            add(begin(node), end(node), repr(2 * node.value if isinstance(node.value, float) else node.value + 1))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in EXTREMA:
                add(end(node.func) - len(name), end(node.func), EXTREMA[name])
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, lines)

    visit(ast.parse(source), range(0))
    return sorted(found, key=lambda mutation: mutation.start)


class Tests(NamedTuple):
    """What a run of all tests has shown.

    Attributes:
        seconds: the processor time of every test.
        reaching: the tests that run a line, by file and line.
    """

    seconds: dict[str, float]
    reaching: dict[str, dict[int, list[str]]]

    @classmethod
    def read(cls) -> "Tests":
        record = json.loads(RECORD.read_text())
        names = list(record["seconds"])
        lines = {
            file: {int(line): [names[i] for i in tests] for line, tests in of_file.items()}
            for file, of_file in record["reaching"].items()
        }
        return cls(record["seconds"], lines)

    def of(self, files: list[str]) -> list[str]:
        """Returns all tests of some files."""
        return [test for test in self.seconds if test.split("::")[0] in files]

    def choose(self, mutation: Mutation, budget: float) -> list[str]:
        """Returns tests of a changed line, for about `budget` seconds: of every test function first one, then more."""
        lines = self.reaching.get(mutation.file, {})
        reaching = {test for line in mutation.lines for test in lines.get(line, [])}
        if not reaching:  # only the import runs the line, so it concerns all that the file does
            reaching = {test for tests in lines.values() for test in tests}
        ranked, seen = [], collections.Counter()
        for test in sorted(reaching, key=lambda test: (self.seconds[test], test)):
            function = test.split("[")[0]
            ranked.append((seen[function], self.seconds[test], test))
            seen[function] += 1
        chosen, total = [], 0.0
        for _, seconds, test in sorted(ranked):
            if total + seconds <= budget or not chosen:
                chosen.append(test)
                total += seconds
        return chosen


class Chosen:
    """A plugin for pytest that runs the chosen tests alone, file by file, the quickest files first."""

    def __init__(self, tests: list[str], seconds: dict[str, float], failed):
        self.tests, self.cost, self.failed = set(tests), collections.Counter(), failed
        for test in tests:
            self.cost[test.split("::")[0]] += seconds[test]

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.tests]
        items.sort(key=lambda item: self.cost[item.nodeid.split("::")[0]])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.put(report.nodeid)


class Recorder:
    """A plugin for pytest that records which lines every test runs, and its processor time."""

    def __init__(self, coverage):
        self.coverage, self.seconds = coverage, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        return result


def run(arguments: list[str], folder: pathlib.Path, plugins: list, quiet: bool) -> int:
    """Runs pytest in this process, with the package in `folder`."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=plugins))


def record_file(file: str, queue) -> None:
    """Runs the tests of a file, and puts what a `Tests` holds into the queue."""
    from coverage import Coverage

    coverage = Coverage(data_file=None, source_pkgs=["keras_node"], config_file=False)
    recorder = Recorder(coverage)
    coverage.start()
    run([file], ROOT, [recorder], quiet=True)
    coverage.stop()
    data, reaching = coverage.get_data(), {}
    for path in data.measured_files():
        lines = data.contexts_by_lineno(path)
        reaching[str(pathlib.Path(path).relative_to(ROOT / "keras_node"))] = lines
    queue.put((recorder.seconds, reaching))


def record(processes) -> None:
    """Runs all tests, every file in a new process because compiled programs stay in memory, and writes the record."""
    seconds, reaching = {}, {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        queue = processes.Queue()
        process = processes.Process(target=record_file, args=(f"tests/{path.name}", queue))
        process.start()
        of_file, lines_of_file = queue.get()
        process.join()
        seconds |= of_file
        for file, lines in lines_of_file.items():
            for line, tests in lines.items():
                reaching.setdefault(file, {}).setdefault(line, []).extend(tests)
        print(f"{path.name}: {len(of_file)} tests, {sum(of_file.values()):.0f} s", flush=True)
    number = {test: i for i, test in enumerate(seconds)}
    for lines in reaching.values():
        for line, tests in lines.items():
            lines[line] = [number[test] for test in tests if test]  # "" stands for the import of the package
    RECORD.write_text(json.dumps({"seconds": seconds, "reaching": reaching}))


def try_one(mutation: Mutation, tests: list[str], seconds: dict[str, float], failed) -> None:
    """Ends this process, with 0 if the tests pass in spite of the change."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ROOT.iterdir():
            if part.name in ("keras_node", "tests"):
                shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not part.name.startswith("."):
                (folder / part.name).symlink_to(part)
        path = folder / "keras_node" / mutation.file
        data = path.read_bytes()
        path.write_bytes(data[: mutation.start] + mutation.new.encode() + data[mutation.end :])
        files = sorted({test.split("::")[0] for test in tests})
        code = run(["-x", *files], folder, [Chosen(tests, seconds, failed)], quiet=True)
    os._exit(code)


def notice(processes, mutation: Mutation, tests: list[str], seconds: dict[str, float], timeout: float) -> str | None:
    """Returns what notices the change: the first test that fails, or how the run ended; `None` if all tests pass."""
    failed = processes.SimpleQueue()
    process = processes.Process(target=try_one, args=(mutation, tests, seconds, failed))
    process.start()
    process.join(timeout)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    return failed.get() if not failed.empty() else f"exit {process.exitcode}"


def main():
    """Records the tests, or tries all changes or a random sample of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "try"])
    parser.add_argument("--files", nargs="*", default=FILES)
    parser.add_argument("--sample", type=int, help="number of changes to try; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="processor time of the tests of one change")
    parser.add_argument("--tests", nargs="*", help="run all tests of these files instead, as in tests/test_clock.py")
    parser.add_argument("--again", type=pathlib.Path, help="try what survived according to this output")
    args = parser.parse_args()

    # Processes begin as copies of this one, in which all but the package is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for module in ("keras", "tensorflow", "tensorflow_probability", "scipy.integrate", "hypothesis"):
        __import__(module)
    processes = multiprocessing.get_context("fork")
    if args.what == "record":
        record(processes)
        return
    tests = Tests.read()
    every = [mutation for file in args.files for mutation in mutations(file)]
    if args.again is not None:
        survived = {line.split(": SURVIVED")[0] for line in args.again.read_text().splitlines() if "SURVIVED" in line}
        every = [mutation for mutation in every if str(mutation) in survived]
    chosen = every if args.sample is None else random.Random(args.seed).sample(every, min(args.sample, len(every)))
    print(f"{len(chosen)} of {len(every)} changes", flush=True)
    survivors = 0
    for mutation in chosen:
        to_run = tests.choose(mutation, args.seconds) if args.tests is None else tests.of(args.tests)
        noticed = notice(processes, mutation, to_run, tests.seconds, timeout=60 + 5 * args.seconds)
        survivors += noticed is None
        print(f"{mutation}: {noticed or f'SURVIVED {len(to_run)} tests'}", flush=True)
    print(f"{survivors} of {len(chosen)} survived")


if __name__ == "__main__":
    main()
