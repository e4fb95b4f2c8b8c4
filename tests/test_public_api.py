"""What a user sees of the package: names, types and docstrings."""

import inspect
import pathlib
import re
import subprocess
import sys

import keras
import pytest

import keras_node

ROOT = pathlib.Path(__file__).parent.parent
MODULES = {"plots": keras_node.plots, "utils": keras_node.utils}


def public():
    """Every public function and class, by the name under which a user finds it."""
    yield from ((name, getattr(keras_node, name)) for name in keras_node.__all__ if name not in MODULES)
    for module, content in MODULES.items():
        yield from ((f"{module}.{name}", getattr(content, name)) for name in content.__all__)


NAMES = [name for name, _ in public()]
OBJECTS = dict(public())


def signatures(thing):
    """The functions that a public object lets a user call, with their names; those of Keras alone are left out."""
    if not inspect.isclass(thing):
        yield thing.__name__, thing
        return
    for name in dir(thing):
        method = inspect.getattr_static(thing, name)
        method = method.__func__ if isinstance(method, classmethod | staticmethod) else method
        method = method.fget if isinstance(method, property) else method
        ours = inspect.isfunction(method) and method.__module__.startswith("keras_node")
        if ours and (not name.startswith("_") or name == "__init__"):
            yield f"{thing.__name__}.{name}", method


@pytest.mark.parametrize("name", NAMES)
def test_every_public_function_says_its_types(name):
    bare = []
    for where, function in signatures(OBJECTS[name]):
        signature = inspect.signature(function)
        if signature.return_annotation is inspect.Signature.empty and not where.endswith(".__init__"):
            bare.append(f"{where} -> ?")
        for parameter in list(signature.parameters.values())[inspect.isclass(OBJECTS[name]) :]:
            if parameter.annotation is inspect.Parameter.empty:
                bare.append(f"{where}({parameter})")
    assert not bare


@pytest.mark.parametrize("name", NAMES)
def test_every_public_docstring_has_what_a_reader_needs(name):
    thing = OBJECTS[name]
    text = inspect.getdoc(thing)
    assert re.match(r".+[.]", text.splitlines()[0])
    if name in ("SecondOrder", "TimeConcatenation"):
        assert "former name" in text
        return
    if isinstance(thing, type) and issubclass(thing, keras.Layer):
        sections = ["Args:", "Input shape:", "Output shape:", "Example:", "Reference:"]
        assert [section for section in sections if section in text] == sections
        assert text.index("Args:") < text.index("Input shape:") < text.index("Output shape:") < text.index("Example:")
    if inspect.isfunction(thing):
        assert "Args:" in text
        assert "Example:" in text
    constructor = thing.__init__ if inspect.isclass(thing) else thing
    taken = [p for p in inspect.signature(constructor).parameters if p not in ("self", "args", "kwargs", "_")]
    if "Args:" in text:
        explained = text[text.index("Args:") :]
        assert [p for p in taken if not re.search(rf"^ +(\w+, )*{p}(, \w+)*:", explained, re.MULTILINE)] == []


def test_every_public_name_is_in_the_api_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown, module = set(), ""
    for line in pages.splitlines():
        if found := re.match(r"\.\. currentmodule:: keras_node\.?(\w*)", line):
            module = f"{found[1]}." if found[1] else ""
        elif found := re.match(r"\.\. auto(?:class|function):: (\w+)", line):
            shown.add(module + found[1])
    assert shown == set(NAMES)


def test_an_import_needs_no_matplotlib_and_leaves_the_settings_of_keras_free():
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import keras, keras_node\n"
        "try: keras_node.plots.evaluations({'ode_evaluations': [1.0]})\n"
        "except ImportError as error: print(error)\n"
        "keras.config.set_floatx('float64')\n"
        "print(keras.layers.Dense(1).dtype_policy.name, keras_node.ODELayer(lambda y: -y).dtype_policy.name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "keras-node[plots]"' in result.stdout
    assert result.stdout.splitlines()[-1] == "float64 float64"


def test_the_version_is_the_same_everywhere():
    version = keras_node.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
