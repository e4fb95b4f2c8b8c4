"""Changes one sign, comparison, constant or extremum of the numerics at a time, and prints what no test notices.

    python benchmarks/mutations.py --sample 20

The script changes a copy of the package, and no file of the project. If a change survives, none of the chosen tests
needs this line, or the change makes no difference.
"""

import argparse
import ast
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
FILES = [
    "integrate.py",
    "step_size.py",
    "clock.py",
    *(f"gradients/{p.name}" for p in sorted((ROOT / "keras_node" / "gradients").glob("*.py"))),
]
TESTS = ["test_solutions.py", "test_step_at.py", "test_checkpointed.py", "test_gradients.py"]

SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.And: "or", ast.Or: "and", ast.BitAnd: "|", ast.BitOr: "&",
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
    """A replacement of the characters from `start` to `end` of a file by `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str


def mutations(file: str) -> list[Mutation]:
    """Returns all changes of a file, in the order of its lines."""
    source = (ROOT / "keras_node" / file).read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data, found = source.encode(), []

    def add(node, start, end, new):
        found.append(Mutation(file, node.lineno, start, end, data[start:end].decode(), new))

    def begin(node):
        return starts[node.lineno - 1] + node.col_offset

    def end(node):
        return starts[node.end_lineno - 1] + node.end_col_offset

    def between(node, left, right, operator):
        """Adds a change of the operator between two operands. The syntax tree does not hold its position."""
        if type(operator) not in SWAPS:
            return
        text = data[end(left) : begin(right)].decode()
        symbol = {ast.And: "and", ast.Or: "or", ast.BitAnd: "&", ast.BitOr: "|", ast.Add: "+", ast.Sub: "-"}
        symbol |= {ast.Mult: "*", ast.Div: "/", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
        symbol = (symbol | {ast.Eq: "==", ast.NotEq: "!="})[type(operator)]
        if symbol in text:
            place = end(left) + len(text[: text.index(symbol)].encode())
            add(node, place, place + len(symbol), SWAPS[type(operator)])

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            between(node, node.left, node.right, node.op)
        elif isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                between(node, left, right, operator)
        elif isinstance(node, ast.BoolOp):
            between(node, node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
            add(node, begin(node), begin(node) + (3 if isinstance(node.op, ast.Not) else 1), "")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            add(node, begin(node), end(node), repr(2 * node.value if isinstance(node.value, float) else node.value + 1))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            add(node, begin(node), end(node), repr(not node.value))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in EXTREMA:
                add(node, end(node.func) - len(name), end(node.func), EXTREMA[name])
    return sorted(found, key=lambda mutation: mutation.start)


def survives(mutation: Mutation, tests: list[str], timeout: float) -> bool:
    """Returns whether the tests pass in spite of the change. A run that does not end counts as a failure."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("keras_node", "tests"):
            shutil.copytree(ROOT / part, pathlib.Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "conftest.py"):
            shutil.copy(ROOT / part, folder)
        path = pathlib.Path(folder) / "keras_node" / mutation.file
        data = path.read_bytes()
        path.write_bytes(data[: mutation.start] + mutation.new.encode() + data[mutation.end :])
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        environment = {**os.environ, "PYTHONPATH": folder, "TF_CPP_MIN_LOG_LEVEL": "3"}
        try:
            run = subprocess.run(
                [*command, *(f"tests/{test}" for test in tests)],
                cwd=folder, env=environment, capture_output=True, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        return run.returncode == 0


def main():
    """Tries all changes, or a random sample of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", default=FILES)
    parser.add_argument("--tests", nargs="*", default=TESTS)
    parser.add_argument("--sample", type=int, help="number of changes to try; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900)
    args = parser.parse_args()
    every = [mutation for file in args.files for mutation in mutations(file)]
    chosen = every if args.sample is None else random.Random(args.seed).sample(every, min(args.sample, len(every)))
    print(f"{len(chosen)} of {len(every)} changes", flush=True)
    survivors = 0
    for mutation in chosen:
        alive = survives(mutation, args.tests, args.timeout)
        survivors += alive
        change = f"{mutation.old.strip()!r} -> {mutation.new!r}"
        print(f"{'SURVIVED' if alive else 'noticed '} {mutation.file}:{mutation.line} {change}", flush=True)
    print(f"{survivors} of {len(chosen)} survived")


if __name__ == "__main__":
    main()
