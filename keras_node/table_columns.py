"""The columns of a table as NumPy arrays, checked: ids and names, numbers, and times."""

import datetime
import numbers
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

_UNITS = ("W", "D", "h", "m", "s", "ms", "us", "ns")


def column(frame: Any, name: Hashable, rows: int | None = None) -> np.ndarray:
    """Returns a column. It must have this number of rows."""
    if not isinstance(frame, Mapping) and not hasattr(frame, "columns"):
        raise TypeError(f"`frame` must be a DataFrame or a dict of columns. Received: {type(frame).__name__}")
    try:
        entries = np.asarray(frame[name])
    except (KeyError, IndexError, TypeError) as error:
        columns = list(getattr(frame, "columns", frame))
        raise ValueError(f"The table has no column {name!r}. Received: a table with the columns {columns}") from error
    if entries.ndim != 1:
        raise ValueError(
            f"Column {name!r} must hold one entry for every row; a table with two columns of one name has several. "
            f"Received: shape {entries.shape}"
        )
    if rows is not None and len(entries) != rows:
        raise ValueError(
            f"All columns must have the same length. Received: {len(entries)} entries in column {name!r}, and {rows} "
            "in the column of ids"
        )
    return entries


def numeric(frame: Any, name: Hashable, rows: int) -> np.ndarray:
    """Returns a column of numbers as float64. A missing number is NaN."""
    entries = column(frame, name, rows)
    try:
        if entries.dtype.kind not in "biufOUS":
            raise TypeError
        if entries.dtype.kind == "O":
            entries = np.array([np.nan if _is_missing(entry) else entry for entry in entries.tolist()])
        values = entries.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Column {name!r} must hold numbers; encode text first, for example one-hot. "
            f"Received: dtype {entries.dtype}"
        ) from error
    too_large = np.abs(values) > np.finfo(np.float32).max
    if np.any(too_large):
        row = int(np.argmax(too_large))
        raise ValueError(
            f"Column {name!r} has values that float32 cannot hold. Scale the column, and make what is unknown NaN. "
            f"Received: {values[row]} in row {row}"
        )
    return values


def places(frame: Any, name: Hashable, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct entries of a column in the order in which they appear, and for every row their place."""
    entries = column(frame, name, rows)
    listed = entries.tolist()
    for row, entry in enumerate(listed):
        if _is_missing(entry):
            raise ValueError(
                f"Column {name!r} must have an entry in every row. Drop the rows without one, or fill them in. "
                f"Received: {entry!r} in row {row}"
            )
    found: dict[Hashable, int] = {}
    place = np.array([found.setdefault(entry, len(found)) for entry in listed], int)
    _, first = np.unique(place, return_index=True)
    return entries[first], place


def elapsed(frame: Any, name: Hashable, place: np.ndarray, unit: str | float, origin: Any) -> np.ndarray:
    """Returns the times since the origin, in units, as float64. `place` says to which series a row belongs."""
    times = _times(column(frame, name, len(place)), name)
    one = _one(unit, times.dtype, name)
    if np.any(np.isnat(times) if times.dtype.kind in "Mm" else ~np.isfinite(times)):
        raise ValueError(
            f"Some times in column {name!r} are missing or not finite. Drop these rows, or fill the times in first."
        )
    if isinstance(origin, str) and origin == "first":
        start = np.full(place.max(initial=-1) + 1, times.max() if len(times) else 0, times.dtype)
        np.minimum.at(start, place, times)
        return (times - start[place]) / one
    return (times - _origin(origin, times.dtype)) / one


def _origin(origin: Any, dtype: np.dtype) -> np.ndarray:
    """Returns one time for all series, of the kind of the times."""
    try:
        start = np.asarray(origin, "M8" if isinstance(origin, str) and dtype.kind == "M" else None)
        start = _times(start.reshape(-1), "origin")
        if start.shape == (1,) and start.dtype.kind == dtype.kind and start[0] == start[0]:
            return start
    except ValueError:
        pass
    kind = {"M": "one date", "m": "one duration"}.get(dtype.kind, "one number")
    raise ValueError(f'`origin` must be "first" or, for times of dtype {dtype}, {kind}. Received: origin={origin!r}')


def _times(entries: np.ndarray, name: Hashable) -> np.ndarray:
    """Returns times as `datetime64`, `timedelta64` or float64. Dates with a time zone are moved to UTC."""
    if entries.dtype.kind == "O" and len(entries):
        listed = [None if _is_missing(entry) else entry for entry in entries.tolist()]
        present = [entry for entry in listed if entry is not None]
        if present and all(isinstance(entry, datetime.datetime) for entry in present):
            return np.array([None if entry is None else _in_utc(entry) for entry in listed], "M8[us]")
        if present and all(isinstance(entry, datetime.timedelta) for entry in present):
            return np.array(listed, "m8[us]")
    if entries.dtype.kind in "Mm":
        return entries
    try:
        if entries.dtype.kind not in "biufO":
            raise TypeError
        return entries.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Column {name!r} must hold times: numbers, dates or durations. Convert text first, for example with "
            f"`pandas.to_datetime`. Received: dtype {entries.dtype}"
        ) from error


def _in_utc(date: datetime.datetime) -> datetime.datetime:
    return date if date.tzinfo is None else date.astimezone(datetime.timezone.utc).replace(tzinfo=None)


def _one(unit: str | float, dtype: np.dtype, name: Hashable) -> Any:
    """Returns the length of one unit, by which differences of times are divided."""
    if dtype.kind in "Mm":
        if unit not in _UNITS:
            raise ValueError(
                f"For times of dtype {dtype} in column {name!r}, give a unit of time such as unit='h', one of "
                f"{_UNITS}. Received: unit={unit!r}"
            )
        return np.array(1, f"m8[{unit}]")
    if isinstance(unit, bool) or not isinstance(unit, numbers.Real) or not 0 < unit < np.inf:
        raise ValueError(
            f"For times of dtype {dtype} in column {name!r}, give the length of a unit as a number above 0. "
            f"Received: unit={unit!r}"
        )
    return float(unit)


def _is_missing(entry: Any) -> bool:
    """True of `None`, NaN, NaT, and of the NA of pandas, of which Python cannot say whether it equals itself."""
    try:
        return entry is None or bool(entry != entry)
    except TypeError:
        return True
