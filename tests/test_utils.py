"""From a table of observations to padded arrays."""

import numpy as np
import pytest

from keras_node.utils import series_from_frame

pd = pytest.importorskip("pandas")


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
        ({"id": [1], "time": [np.nan], "value": [1.0]}, {}, "times are missing"),
        ({"id": [1], "time": [0.0], "value": ["red"]}, {}, "'value' must hold numbers"),
        ({"id": [1, 1], "time": [0, 1], "value": [1.0, 2.0]}, {"length": 1}, "Series 1 has 2 observations"),
        ({"id": [1], "time": [0.0], "value": [1.0]}, {"unit": "h"}, "length of a unit as a number"),
        ({"id": [1], "time": np.array(["2026-01-01"], "M8[D]"), "value": [1.0]}, {}, "unit='h'"),
        ({"id": [1], "time": [0.0], "value": [1.0]}, {"channels": ["a"]}, "`channels` is for long tables"),
    ],
)
def test_mistakes_are_named(table, options, message):
    with pytest.raises(ValueError, match=message):
        series_from_frame(table, **options)
