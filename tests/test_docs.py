"""The code in the README runs. That of the site is run by its build, `make docs`."""

import pathlib
import re

import keras
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    # The data are the reader's.
    names = {"x": rng.normal(size=(64, 8)), "y": rng.integers(10, size=64)}
    code = "\n".join(blocks(ROOT / "README.md"))
    exec(compile(code, "README.md", "exec"), names)
    loaded = keras.models.load_model("m.keras")
    np.testing.assert_allclose(loaded.predict(names["x"], verbose=0), names["model"].predict(names["x"], verbose=0))
    assert pathlib.Path("served/saved_model.pb").exists()
