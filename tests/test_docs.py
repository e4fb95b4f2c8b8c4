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


def table_of_reproduced_results():
    """The rows of the table, as lists of cells. A row without an experiment belongs to the one above."""
    lines = (ROOT / "docs/reproduced-results.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return rows[1:]  # without the heads


def test_the_table_of_reproduced_results_repeats_what_was_recorded():
    name, rows = None, table_of_reproduced_results()
    assert len(rows) > 20
    for experiment, measured, _, ours, seeds, command, took in rows:
        if experiment:
            (name,) = re.findall(r"\(gallery/(\w+)\.md\)", experiment)
            assert command == f"`python examples/{name}.py`"
            recorded = (ROOT / f"docs/gallery/{name}.txt").read_text()
            assert f"took {took}" in recorded, name
            assert re.search(rf"\b{seeds} seed", recorded) or seeds == "1", name
        for figure in re.findall(r"[-\d.]+(?: ± [\d.]+)?", ours):
            assert figure in recorded, (name, measured, figure)


def test_published_figures_stand_in_the_table_as_in_the_examples():
    rows, name, published = table_of_reproduced_results(), None, {}
    for experiment, _, figure, *_ in rows:
        if experiment:
            (name,) = re.findall(r"\(gallery/(\w+)\.md\)", experiment)
        published.setdefault(name, []).extend(re.findall(r"[\d.]+", figure))
    for name, figures in published.items():
        recorded = (ROOT / f"docs/gallery/{name}.txt").read_text()
        source = (ROOT / f"examples/{name}.py").read_text()
        assert all(figure in recorded or figure in source for figure in figures), name
