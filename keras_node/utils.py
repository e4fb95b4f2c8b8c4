"""Help with data: from a table of observations to the padded arrays that the layers for series take."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Series", "series_from_frame"]


class Series(NamedTuple):
    """Series of several lengths, padded to arrays of one shape.

    Attributes:
        ids: the id of every series, `(N,)`, in the order in which they appear in the table.
        times: elapsed times, `(N, T)` float32, increasing. Padding repeats the last time of a series, so that no time
            elapses there.
        values: the observed values, `(N, T, D)` float32. What was not observed is NaN, padding included.
        mask: `(N, T)` booleans, true for observations and false for padding. It is the Keras mask of the series.
        channels: the names of the `D` channels.
    """

    ids: np.ndarray
    times: np.ndarray
    values: np.ndarray
    mask: np.ndarray
    channels: tuple[Hashable, ...]


def series_from_frame(
    frame: Any,
    *,
    id: Hashable = "id",
    time: Hashable = "time",
    value: Hashable | list[Any] = "value",
    variable: Hashable | None = None,
    channels: Sequence[Hashable] | None = None,
    unit: str | float = 1.0,
    origin: Any = "first",
    length: int | None = None,
) -> Series:
    """Makes padded arrays of a table of observations, for `keras_node.ODERNN`, `NeuralCDE` and `LatentODE`.

    The table is long, with one row for every value and a column that names the variable, or wide, with one row for
    every time and a column for every channel. Its rows may be in any order. Values of one series at one time become
    one observation.

    Args:
        frame: a pandas or polars DataFrame, or a dict of columns.
        id: the column that tells the series apart. Defaults to `"id"`.
        time: the column of times: numbers, or dates (`datetime64`). Defaults to `"time"`.
        value: in a long table the column of values; in a wide table the columns of the channels, a list. Defaults to
            `"value"`.
        variable: in a long table the column that names the channel of a value. By default the table is wide.
        channels: in a long table the channels, in the order of the last axis. Give them when you convert test data, so
            that it has the channels of the training data; rows of other variables are left out. By default all
            variables, sorted.
        unit: how long one unit of elapsed time is. For dates one of NumPy's units, such as `"D"` or `"h"`; for numbers
            the number by which differences of times are divided. Choose it so that typical gaps are near 1. Defaults to
            `1.0`.
        origin: the time that becomes 0: `"first"` (default) for the first time of every series, or one time for all.
            Times are subtracted before they are rounded to float32, so that seconds since 1970 keep their differences.
        length: the length `T` to pad to, for example that of the training data. Longer series are refused. By default
            that of the longest series.

    Returns:
        A `keras_node.utils.Series`: `ids`, `times`, `values`, `mask` and `channels`.

    Raises:
        ValueError: if a column is missing, if a series has two values of a channel at one time, if a time is missing,
            or if a series is longer than `length`.

    Example:
        >>> table = {
        ...     "patient": ["a", "a", "a", "b"],
        ...     "hour": [0.0, 2.0, 2.0, 5.0],
        ...     "name": ["pulse", "pulse", "lactate", "pulse"],
        ...     "value": [80.0, 90.0, 1.5, 70.0],
        ... }
        >>> series = keras_node.utils.series_from_frame(table, id="patient", time="hour", variable="name")
        >>> series.channels
        ('lactate', 'pulse')
        >>> series.values[0]
        array([[ nan, 80. ],
               [ 1.5, 90. ]], dtype=float32)
        >>> series.mask
        array([[ True,  True],
               [ True, False]])
    """
    names, rows = _distinct(_column(frame, id))
    elapsed = _elapsed(_column(frame, time), rows, len(names), unit, origin)
    if variable is None:
        if channels is not None:
            raise ValueError(
                "`channels` is for long tables; in a wide table `value` lists the columns. "
                f"Received: channels={list(channels)!r}, variable=None"
            )
        channel_names = tuple(value) if isinstance(value, list) else (value,)
        table = np.stack([_numbers(frame, column) for column in channel_names], axis=-1)
        rows, elapsed = (np.repeat(x, len(channel_names)) for x in (rows, elapsed))
        places, given = np.tile(np.arange(len(channel_names)), len(table)), table.ravel()
    else:
        kinds = _column(frame, variable)
        channel_names = tuple(np.unique(kinds).tolist() if channels is None else channels)
        index = {name: i for i, name in enumerate(channel_names)}
        places = np.array([index.get(kind, -1) for kind in kinds.tolist()], int)
        known = places >= 0
        rows, elapsed, places, given = (x[known] for x in (rows, elapsed, places, _numbers(frame, value)))

    # One observation for every series and time, in order; `observation` says to which of them a value belongs.
    moments, observation = np.unique(np.stack([rows, elapsed], axis=-1), axis=0, return_inverse=True)
    observation, owner = observation.reshape(-1), moments[:, 0].astype(int)
    counts = np.bincount(owner, minlength=len(names))
    position = np.arange(len(owner)) - np.searchsorted(owner, owner)
    length = _length(length, counts, names)

    mask = np.arange(length) < counts[:, None]
    times = np.zeros(mask.shape)
    times[owner, position] = moments[:, 1]
    times = np.maximum.accumulate(np.where(mask, times, -np.inf), axis=1)
    times = np.where(np.isfinite(times), times, 0)

    present = ~np.isnan(given)
    cells = np.stack([owner[observation], position[observation], places], axis=-1)[present]
    _refuse_twice(cells, names, times, channel_names)
    values = np.full((*mask.shape, len(channel_names)), np.nan, np.float32)
    values[tuple(cells.T)] = given[present]
    return Series(names, times.astype(np.float32), values, mask, channel_names)


def _column(frame: Any, name: Hashable) -> np.ndarray:
    try:
        return np.asarray(frame[name])
    except (KeyError, IndexError) as error:
        columns = list(getattr(frame, "columns", frame))
        raise ValueError(f"The table has no column {name!r}. Received: a table with the columns {columns}") from error


def _numbers(frame: Any, name: Any) -> np.ndarray:
    column = _column(frame, name)
    try:
        return column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Column {name!r} must hold numbers; encode text first, for example one-hot. Received: dtype {column.dtype}"
        ) from error


def _distinct(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct entries in the order in which they appear, and for every row the place of its entry."""
    names, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return names[order], place[inverse.reshape(-1)]


def _elapsed(column: np.ndarray, rows: np.ndarray, count: int, unit: str | float, origin: Any) -> np.ndarray:
    """The times since the origin, in units, as float64."""
    dates = column.dtype.kind == "M"
    if dates != isinstance(unit, str):
        advice = "give a NumPy unit of time, such as unit='h'" if dates else "give the length of a unit as a number"
        raise ValueError(f"For times of dtype {column.dtype}, {advice}. Received: unit={unit!r}")
    if not dates:
        column = column.astype(np.float64)
    if np.any(np.isnat(column) if dates else ~np.isfinite(column)):
        raise ValueError("Some times are missing or not finite. Drop these rows, or fill the times in first.")
    if isinstance(origin, str) and origin == "first":
        start = np.full(count, column.max() if count else 0, column.dtype)
        np.minimum.at(start, rows, column)
        start = start[rows]
    else:
        start = np.asarray(origin, column.dtype)
    return (column - start) / (np.array(1, f"m8[{unit}]") if dates else float(unit))


def _length(length: int | None, counts: np.ndarray, names: np.ndarray) -> int:
    """The length to pad to."""
    longest = int(counts.max(initial=0))
    if length is not None and longest > length:
        name = names.tolist()[counts.argmax()]
        raise ValueError(
            f"Series {name!r} has {longest} observations, more than `length`. Cut it first, or give a greater "
            f"`length`. Received: length={length}"
        )
    return longest if length is None else length


def _refuse_twice(cells: np.ndarray, names: np.ndarray, times: np.ndarray, channels: tuple[Hashable, ...]) -> None:
    cell, count = np.unique(cells, axis=0, return_counts=True)
    if np.any(count > 1):
        row, position, place = cell[count.argmax()]
        raise ValueError(
            f"Series {names.tolist()[row]!r} has {count.max()} values of {channels[place]!r} at one time. Average them "
            "first; with pandas, `frame.groupby([id, time, variable]).mean()`. "
            f"Received: elapsed time {times[row, position]:g}"
        )
