"""From a table of observations to padded arrays."""

import numpy as np
import pytest

from keras_node.utils import series_from_frame

pd = pytest.importorskip("pandas")

ROWS = {"id": ["a", "a"], "time": [0.0, 1.0], "value": [1.0, 2.0]}


def long_table(seed=0, drop=0.5):
    """A random long table with its rows shuffled, and the observations it holds by (id, time, variable)."""
    rng = np.random.default_rng(seed)
    rows = [
        (name, float(time), variable, float(rng.normal()))
        for name in ("c", "a", "b")
        for time in np.round(np.cumsum(rng.exponential(size=rng.integers(3, 7))) + 100, 3)
        for variable in ("x", "y")
        if rng.random() > drop
    ]
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=["id", "time", "variable", "value"]), {row[:3]: row[3] for row in rows}


def test_every_value_of_a_long_table_is_in_its_place_and_nothing_else_is():
    frame, expected = long_table()
    series = series_from_frame(frame, variable="variable", origin=0.0)
    assert list(series.ids) == list(frame["id"].unique())
    assert series.channels == ("x", "y")
    found = {}
    for i, t, d in np.argwhere(~np.isnan(series.values)):
        assert series.mask[i, t]
        key = (series.ids[i], round(float(series.times[i, t]), 3), series.channels[d])
        found[key] = series.values[i, t, d]
    assert found.keys() == {(name, round(time, 3), variable) for name, time, variable in expected}
    for (name, time, variable), value in expected.items():
        np.testing.assert_allclose(found[name, round(time, 3), variable], value, rtol=1e-6)
    # Every observation has a value; times grow, and stand still in the padding.
    assert np.all(np.any(~np.isnan(series.values), -1) == series.mask)
    gaps = np.diff(series.times, axis=1)
    assert np.all((gaps > 0) == series.mask[:, 1:])


def test_a_wide_table_equals_its_long_form():
    frame, _ = long_table(drop=0.3)
    wide = frame.pivot(index=["id", "time"], columns="variable", values="value").reset_index()
    wide = wide.set_index("id").loc[frame["id"].unique()].reset_index()
    a = series_from_frame(frame, variable="variable")
    b = series_from_frame(wide, value=["x", "y"])
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


def test_dates_become_elapsed_units_and_large_times_keep_their_differences():
    start = np.datetime64("2026-01-01T00:00", "s")
    frame = pd.DataFrame({"id": [7, 7, 8], "time": start + np.array([0, 5400, 86400], "timedelta64[s]"), "value": 1.0})
    np.testing.assert_allclose(series_from_frame(frame, unit="h").times, [[0.0, 1.5], [0.0, 0.0]])
    np.testing.assert_allclose(series_from_frame(frame, unit="D", origin=start).times, [[0, 0.0625], [1, 1]])
    # Seconds since 1970 differ by less than float32 can tell near 1.7e9.
    seconds = {"id": [0, 0], "time": [1_700_000_000.0, 1_700_000_003.0], "value": [1.0, 2.0]}
    np.testing.assert_allclose(series_from_frame(seconds, unit=60.0).times, [[0.0, 0.05]], rtol=1e-6)


def test_durations_and_dates_with_a_time_zone_become_elapsed_units():
    hours = pd.date_range("2026-03-29", periods=4, freq="h", tz="Europe/Zurich")  # the clocks go forward in this night
    table = {"id": ["a", "a", "a", "b"], "value": [1.0, 2.0, 3.0, 4.0]}
    frame = pd.DataFrame({**table, "time": hours})
    np.testing.assert_allclose(series_from_frame(frame, unit="h").times, [[0, 1, 2], [0, 0, 0]])
    for origin in (hours[1], "2026-03-29T00:00"):
        np.testing.assert_allclose(series_from_frame(frame, unit="m", origin=origin).times[0], [-60, 0, 60])
    durations = {**table, "time": np.array([30, 60, 90, 90], "m8[m]")}
    np.testing.assert_allclose(series_from_frame(durations, unit="h").times[0], [0, 0.5, 1])
    origin = np.timedelta64(1, "h")
    np.testing.assert_allclose(series_from_frame(durations, unit="h", origin=origin).times[0], [-0.5, 0, 0.5])


def test_ids_of_several_types_and_missing_numbers():
    frame = pd.DataFrame({"id": ["b", 1, "b"], "time": [0.0, 0.0, 1.0], "value": pd.array([1, 2, None], "Int64")})
    series = series_from_frame(frame)
    assert list(series.ids) == ["b", 1]
    np.testing.assert_array_equal(series.values[..., 0], [[1, np.nan], [2, np.nan]])
    np.testing.assert_array_equal(series.mask, [[True, True], [True, False]])


def test_test_data_takes_the_channels_and_the_length_of_the_training_data():
    frame, _ = long_table()
    only_y = frame[frame["variable"] == "y"]
    series = series_from_frame(only_y, variable="variable", channels=["z", "y"], length=9)
    assert series.values.shape == (only_y["id"].nunique(), 9, 2)
    assert np.all(np.isnan(series.values[..., 0]))
    assert np.sum(~np.isnan(series.values)) == len(only_y)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"id": [1], "value": [1.0]}, {}, r"no column 'time'.*\['id', 'value'\]"),
        ({"id": [1, 1], "time": [0, 0], "value": [1.0, 2.0]}, {}, "Series 1 has 2 values of 'value' at one time"),
        ({"id": [1], "time": [np.nan], "value": [1.0]}, {}, "times in column .time. are missing"),
        ({"id": [1], "time": [0.0], "value": ["red"]}, {}, "'value' must hold numbers"),
        ({"id": [1, 1], "time": [0, 1], "value": [1.0, 2.0]}, {"length": 1}, "Series 1 has 2 observations"),
        ({"id": [1], "time": [0.0], "value": [1.0]}, {"unit": "h"}, "length of a unit as a number"),
        ({"id": [1], "time": np.array(["2026-01-01"], "M8[D]"), "value": [1.0]}, {}, "unit='h'"),
        ({"id": [1], "time": [0.0], "value": [1.0]}, {"channels": ["a"]}, "`channels` is for long tables"),
        ({**ROWS, "id": ["a", None]}, {}, "an entry in every row.*None in row 1"),
        ({**ROWS, "id": [1.0, np.nan]}, {}, "an entry in every row.*nan in row 1"),
        ({**ROWS, "id": pd.array([1, None], "Int64")}, {}, "an entry in every row"),
        ({**ROWS, "time": [0.0]}, {}, "1 entries in column 'time', and 2"),
        ({**ROWS, "time": ["monday", "tuesday"]}, {}, "numbers, dates or durations"),
        ({**ROWS, "time": np.array([1, 2], "m8[h]")}, {}, "a unit of time.*unit=1.0"),
        ({**ROWS, "value": np.zeros((2, 2))}, {}, r"one entry for every row.*\(2, 2\)"),
        ({**ROWS, "value": [1.0, 1e39]}, {}, "float32 cannot hold.*in row 1"),
        (ROWS, {"unit": 0}, "number above 0.*unit=0"),
        (ROWS, {"unit": -1.0}, "number above 0.*unit=-1.0"),
        (ROWS, {"origin": "last"}, "one number.*origin='last'"),
        (ROWS, {"origin": [0.0, 1.0]}, "one number"),
        ({**ROWS, "time": np.array([1, 2], "M8[D]")}, {"unit": "M"}, "a unit of time.*unit='M'"),
        ({**ROWS, "time": np.array([1, 2], "M8[D]")}, {"unit": "h", "origin": 0.0}, "one date.*origin=0.0"),
        (ROWS, {"value": ["value", "value"]}, "`value` must list the channels, each of them once"),
        (ROWS, {"value": []}, "`value` must list the channels"),
        (ROWS, {"length": 2.5}, "positive integer.*length=2.5"),
        ({**ROWS, "name": ["x", "y"]}, {"variable": "name", "channels": ["x", "x"]}, "each of them once"),
        ({**ROWS, "name": ["x", "y"]}, {"variable": "name", "channels": ["z"]}, "one of the channels.*'x', 'y'"),
        ({**ROWS, "name": ["x", "y"]}, {"variable": "name", "value": ["value"]}, "stand in one column"),
        ({**ROWS, "name": ["x", None]}, {"variable": "name"}, "Column 'name' must have an entry"),
    ],
)
def test_mistakes_are_named(table, options, message):
    with pytest.raises(ValueError, match=message):
        series_from_frame(table, **options)


def test_what_is_not_a_table_is_refused():
    with pytest.raises(TypeError, match=r"a DataFrame or a dict of columns.* ndarray"):
        series_from_frame(np.zeros((3, 3)))
