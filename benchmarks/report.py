"""Writes the measurements as tables in Markdown."""

import dataclasses

import numpy as np

# The whole steps that a user may choose from. The tables use the fastest.
OURS = ("ours backsolve", "ours checkpointed", "ours default")


@dataclasses.dataclass
class Row:
    """The measurements of one method on one case."""

    library: str
    method: str
    evaluations: float | None
    first: float
    state_error: float
    gradient_error: float
    seconds: list

    @property
    def name(self) -> str:
        return f"{self.library} {self.method}"

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def least(self) -> float:
        """The least time, because other work on the machine disturbs it least."""
        return float(np.min(self.seconds))


def table(case, rows, notes) -> list[str]:
    """Returns a table of the rows of a case, and the notes on methods without a row."""
    ours = min((row.least for row in rows if row.name in OURS), default=float("nan"))
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
            f"| {row.name} | {1e3 * row.median:.2f} | {1e3 * row.least:.2f} "
            f"| {row.least / ours:.2f} | {evaluations} | {errors[0]} | {errors[1]} | {row.first:.1f} |"
        )
    return [*lines, "", *(f"- {note}" for note in notes), *([""] if notes else [])]


def geometric_mean(values) -> float:
    """Returns the geometric mean of ratios."""
    return float(np.exp(np.mean(np.log(values))))


def targets(results) -> list[str]:
    """Returns the table of our times divided by theirs over all cases, by least times and by medians, and our aims."""
    training = [rows for case, (rows, _) in results.items() if case.gradient]
    forward = [rows for case, (rows, _) in results.items() if not case.gradient]

    def ratios(of, to, cases, value):
        """Returns our best value divided by theirs, for every case that has both."""

        def best(rows, methods):
            return min((value(row) for row in rows if row.name.startswith(methods)), default=None)

        pairs = [(best(rows, of), best(rows, to)) for rows in cases]
        return [ours / theirs for ours, theirs in pairs if ours and theirs]

    def aims(value):
        """Returns the name of each comparison, its ratios by case, the statistic that has an aim, and the aim."""
        compiled, adjoint, alone = ("ours backsolve",), "pytorch torchdiffeq adjoint", ("ours backsolve", "ours graph")

        def each(row):
            return value(row) / row.evaluations if row.evaluations else None

        return [
            ("a training step beside diffrax's fastest gradient", ratios(OURS, "jax", training, value), "largest", 1.0),
            ("diffrax's fastest gradient", ratios(OURS, "jax", training, value), "mean", 0.7),
            ("torchdiffeq's adjoint", ratios(OURS, adjoint, training, value), "mean", 0.2),
            ("torchode", ratios(OURS, "pytorch torchode", training, value), "mean", 0.5),
            ("TensorFlow Probability under XLA", ratios(OURS, "tfp", training, value), "mean", 0.5),
            ("the floor (backsolve)", ratios(compiled, "ours floor", training, value), "largest", 1.15),
            (
                "our whole-step XLA, for our default (a graph with compiled solves)",
                ratios("ours default", compiled, training, value),
                "largest",
                1.5,
            ),
            ("diffrax, for the first step", ratios(OURS, "jax", training, lambda row: row.first), "mean", 1.0),
            (
                "torchdiffeq, for ours in eager mode and per evaluation",
                ratios("ours eager", adjoint, training, each),
                "largest",
                2.0,
            ),
            ("the solve alone beside diffrax", ratios(alone, "jax", forward, value), "largest", 1.0),
            ("torchdiffeq", ratios(alone, "pytorch torchdiffeq", forward, value), None, None),
            ("torchode", ratios(alone, "pytorch torchode", forward, value), None, None),
            ("TensorFlow Probability under XLA", ratios(alone, "tfp", forward, value), None, None),
            ("the floor", ratios(compiled, "ours floor", forward, value), "largest", 1.1),
        ]

    lines = [
        "| our time, divided by that of | geometric mean | largest | by medians | largest | aim | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    medians = aims(lambda row: row.median)
    for (name, values, kind, aim), (_, typical, _, _) in zip(aims(lambda row: row.least), medians, strict=True):
        if values:
            reached = max(values) if kind == "largest" else geometric_mean(values)
            verdict = "| | |" if kind is None else f"| {kind} {aim} | {'met' if reached <= aim else 'missed'} |"
            figures = (
                f"{x:.2f}" if x > 0.1 else f"{x:.2g}" for v in (values, typical) for x in (geometric_mean(v), max(v))
            )
            lines.append(f"| {name} | {' | '.join(figures)} {verdict}")
    return lines
