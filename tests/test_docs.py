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


def reproduced_results():
    """Yields the name of each example, its number of seeds and its time, and the rows of its table."""
    for section in (ROOT / "docs/reproduced-results.md").read_text().split("\n## ")[1:]:
        command = re.search(
            r"`python examples/(\w+).py`, (\d+) seeds?, (.*): \[the example\]\(gallery/(\w+).md\)", section
        )
        if command is not None:
            name, seeds, took, page = command.groups()
            assert page == name
            rows = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line
            ]
            yield name, int(seeds), took, rows[2:]  # without the heads


def test_reproduced_results_are_those_that_were_recorded():
    results = list(reproduced_results())
    assert len(results) >= 9
    for name, seeds, took, rows in results:
        recorded = (ROOT / f"docs/gallery/{name}.txt").read_text()
        source = (ROOT / f"examples/{name}.py").read_text()
        assert f"took {took}" in recorded, name
        assert seeds == 1 or f"{seeds} seeds" in recorded, name
        assert len(rows) >= 2, name
        for measured, published, ours in rows:
            figures = re.findall(r"[-\d.]+(?: ± [\d.]+)?", ours)
            assert figures and all(figure in recorded for figure in figures), (name, measured)
            assert all(figure in recorded + source for figure in re.findall(r"[\d.]+", published)), (name, measured)
