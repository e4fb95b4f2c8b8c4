"""Damaged and malicious `.keras` files raise or load; they never run code, and never hang."""

import io
import json
import os
import zipfile

import keras
import numpy as np
import pytest

import keras_node

ONE = np.ones((2, 3), "float32")


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The members of the file of a small model."""
    field = keras.Sequential([keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(3)])
    solver = keras_node.RungeKutta("bosh3", rtol=1e-2, max_steps=50)
    layer = keras_node.ODELayer(field, solver=solver, gradient="checkpointed", name="ode")
    path = tmp_path_factory.mktemp("files") / "model.keras"
    keras.Sequential([keras.Input((3,)), layer]).save(path)
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def archive(members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def raises_or_loads(content, path):
    """What the model in a file of this content predicts; `None` where that, or loading it, raises."""
    path.write_bytes(content)
    try:
        model = keras.models.load_model(path)
        return model(ONE)
    except Exception:
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("member", ["config.json", "model.weights.h5", "metadata.json"])
def test_flipped_bytes_raise_or_load(member, members, tmp_path):
    rng = np.random.default_rng(len(member))
    expected, predicted = raises_or_loads(archive(members), tmp_path / "model.keras"), []
    for _ in range(10):
        content = bytearray(members[member])
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            content[place] ^= 1 << rng.integers(8)
        y = raises_or_loads(archive({**members, member: bytes(content)}), tmp_path / "model.keras")
        predicted += [] if y is None else [y]
    if member == "config.json":
        assert len(predicted) < 10
    if member == "metadata.json":  # on which nothing depends
        for y in predicted:
            np.testing.assert_array_equal(y, expected)
    assert all(y.shape == ONE.shape for y in predicted)


@pytest.mark.filterwarnings("ignore")
def test_truncated_files_raise(members, tmp_path):
    whole = archive(members)
    assert raises_or_loads(whole, tmp_path / "model.keras") is not None
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):
        assert None is raises_or_loads(whole[: int(share * len(whole))], tmp_path / "model.keras")
    for missing in ("config.json", "model.weights.h5"):
        rest = {name: content for name, content in members.items() if name != missing}
        assert None is raises_or_loads(archive(rest), tmp_path / "model.keras")


def values(config, path=()):
    """The places of a config whose value is a string, a number or nothing."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from values(value, (*path, key))
        else:
            yield (*path, key)


def changed(config, place, value):
    config = json.loads(json.dumps(config))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return config


@pytest.mark.filterwarnings("ignore")
def test_values_of_other_kinds_raise_or_load(members, tmp_path):
    config = json.loads(members["config.json"])
    (number,) = (i for i, layer in enumerate(config["config"]["layers"]) if layer["class_name"] == "ODELayer")
    # What belongs to this package, and to the fields in its layers.
    places = [place for place in values(config) if place[:3] == ("config", "layers", number)]
    assert len(places) > 40
    rng = np.random.default_rng(0)
    for value in (None, -1, 1e400, "nothing", [], {}, True):
        for place in rng.permutation(np.arange(len(places)))[:5]:
            mutated = json.dumps(changed(config, places[place], value)).encode()
            raises_or_loads(archive({**members, "config.json": mutated}), tmp_path / "model.keras")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["", "vector_field", "solver", "gradient"])
def test_planted_names_are_not_called(part, members, tmp_path, monkeypatch):
    config = json.loads(members["config.json"])
    (number,) = (i for i, layer in enumerate(config["config"]["layers"]) if layer["class_name"] == "ODELayer")
    place = ("config", "layers", number, *(("config", part) if part else ()))
    ran = tmp_path / "ran"
    command = f"touch {ran}"
    calls = []
    monkeypatch.setattr(os, "system", calls.append)
    planted = [
        {"module": module, "class_name": name, "config": arguments, "registered_name": registered}
        for module, name in (("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"))
        for arguments in (command, {"command": command}, {"args": command, "shell": True})
        for registered in (None, name)
    ]
    planted += [{"module": "os", "class_name": "function", "config": "system", "registered_name": "function"}]
    for thing in planted:
        mutated = json.dumps(changed(config, place, thing)).encode()
        raises_or_loads(archive({**members, "config.json": mutated}), tmp_path / "model.keras")
        assert not calls and not ran.exists(), thing
