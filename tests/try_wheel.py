"""What `make dist` runs in an environment that has the wheel and nothing else: the README's lines, and a saved file.

It is run from a folder without the package, so that the installed one is tried.
"""

import importlib.util
import pathlib
import re
import tempfile

import keras
import numpy as np

import keras_node


def main():
    assert "site-packages" in keras_node.__file__, keras_node.__file__
    for extra in ("matplotlib", "pytest", "pandas", "onnx"):
        assert importlib.util.find_spec(extra) is None, f"{extra} is installed, so this environment shows nothing"
    assert pathlib.Path(keras_node.__file__).with_name("py.typed").exists()

    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    rng = np.random.default_rng(0)
    names = {"x": rng.normal(size=(64, 8)), "y": rng.integers(10, size=64)}
    with tempfile.TemporaryDirectory() as folder:
        code = code.replace("m.keras", f"{folder}/m.keras").replace('"served"', repr(f"{folder}/served"))
        exec(compile(code, "README.md", "exec"), names)
        loaded = keras.models.load_model(f"{folder}/m.keras")
        np.testing.assert_allclose(loaded.predict(names["x"], verbose=0), names["model"].predict(names["x"], verbose=0))
    flow = keras_node.ContinuousFlow(2)
    assert flow.as_distribution().sample(3).shape == (3, 2)
    print(f"keras_node {keras_node.__version__} works as installed")


# The tests collect the docstrings of every file here and import it for that.
if __name__ == "__main__":
    main()
