"""Help with data: from a table of observations to the padded arrays that the layers for series take."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_node.arguments import positive_integer
from keras_node.table_columns import elapsed, numeric, places

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
        time: the column of times: numbers, dates or durations. Dates with a time zone are moved to UTC. Defaults to
            `"time"`.
        value: in a long table the column of values; in a wide table the columns of the channels, a list. Defaults to
            `"value"`.
        variable: in a long table the column that names the channel of a value. By default the table is wide.
        channels: in a long table the channels, in the order of the last axis. Give them when you convert test data, so
            that it has the channels of the training data; rows of other variables are left out. By default all
            variables, sorted.
        unit: how long one unit of elapsed time is. For dates and durations one of `"W"`, `"D"`, `"h"`, `"m"`
            (minutes), `"s"`, `"ms"`, `"us"` and `"ns"`; for numbers the number by which differences of times are
            divided. Choose it so that typical gaps are near 1. Defaults to
            `1.0`.
        origin: the time that becomes 0: `"first"` (default) for the first time of every series, or one time for all.
            Times are subtracted before they are rounded to float32, so that seconds since 1970 keep their differences.
        length: the length `T` to pad to, for example that of the training data. Longer series are refused. By default
            that of the longest series.

    Returns:
        A `keras_node.utils.Series`: `ids`, `times`, `values`, `mask` and `channels`.

    Raises:
        ValueError: if a column is missing or of another length, if an id, a time or the name of a variable is missing,
            if a value is not a number that float32 can hold, if a series has two values of a channel at one time, if no
            row belongs to one of the `channels`, or if a series is longer than `length`.

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
    names, rows = places(frame, id)
    times_elapsed = elapsed(frame, time, rows, unit, origin)
    if variable is None:
        if channels is not None:
            raise ValueError(
                "`channels` is for long tables; in a wide table `value` lists the columns. "
                f"Received: channels={channels!r}, variable=None"
            )
        channel_names = _distinct_list("value", value if isinstance(value, list) else [value])
        given = np.stack([numeric(frame, name, len(rows)) for name in channel_names], axis=-1).ravel()
        channel_places = np.tile(np.arange(len(channel_names)), len(rows))
        rows, times_elapsed = (np.repeat(x, len(channel_names)) for x in (rows, times_elapsed))
    else:
        if isinstance(value, list):
            raise ValueError(
                "In a long table the values stand in one column: give its name, or leave out `variable` if the table "
                f"is wide. Received: value={value!r}, variable={variable!r}"
            )
        kinds, kind = places(frame, variable, len(rows))
        listed = kinds.tolist()
        channel_names = _distinct_list("channels", sorted(listed, key=_rank) if channels is None else channels)
        place_of = {name: place for place, name in enumerate(channel_names)}
        channel_places = np.array([place_of.get(name, -1) for name in listed], int)[kind]
        known = channel_places >= 0
        if len(rows) and not np.any(known):
            raise ValueError(
                f"No row of the table belongs to one of the channels. Received: channels={list(channel_names)!r} for "
                f"a table with {listed!r} in column {variable!r}"
            )
        given = numeric(frame, value, len(rows))
        rows, times_elapsed, channel_places, given = (x[known] for x in (rows, times_elapsed, channel_places, given))

    # One observation for every series and time, in order; `observation` says to which of them a value belongs.
    moments, observation = np.unique(np.stack([rows, times_elapsed], axis=-1), axis=0, return_inverse=True)
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
    cells = np.stack([owner[observation], position[observation], channel_places], axis=-1)[present]
    _refuse_twice(cells, names, times, channel_names)
    values = np.full((*mask.shape, len(channel_names)), np.nan, np.float32)
    values[tuple(cells.T)] = given[present]
    return Series(names, times.astype(np.float32), values, mask, channel_names)


def _distinct_list(argument: str, names: Any) -> tuple[Hashable, ...]:
    """Returns the names of channels as a tuple. None may occur twice."""
    if isinstance(names, str) or not len(names) or len(set(names)) < len(names):
        raise ValueError(f"`{argument}` must list the channels, each of them once. Received: {argument}={names!r}")
    return tuple(names)


def _rank(name: Hashable) -> tuple[str, Hashable]:
    """The order of channels: numbers by value, text by letters, numbers before text if there are both."""
    return ("" if isinstance(name, (int, float)) else type(name).__name__, name)


def _length(length: int | None, counts: np.ndarray, names: np.ndarray) -> int:
    """The length to pad to."""
    longest = int(counts.max(initial=0))
    length = None if length is None else positive_integer("length", length)
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
