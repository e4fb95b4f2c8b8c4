"""The site: `make docs` builds it with Sphinx, and runs the code of every guide as a notebook."""

import enum
import inspect
import os
import pathlib

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.util.inspect import stringify_signature

import keras_node

# The kernels that run the guides inherit this. TensorFlow's log would appear among the outputs.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["IPYTHONDIR"] = str(pathlib.Path(__file__).with_name("_build") / "ipython")
startup = pathlib.Path(os.environ["IPYTHONDIR"], "profile_default", "startup")
startup.mkdir(parents=True, exist_ok=True)
# A filter, because TensorFlow sets the level itself.
(startup / "quiet.py").write_text(
    'import logging\n\nlogging.getLogger("tensorflow").addFilter(lambda record: record.levelno >= logging.ERROR)\n'
)

project = "keras_node"
author = "The keras_node authors"
copyright = author
release = version = keras_node.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]

# Strict: what cannot be found, or fails when it is run, ends the build (`sphinx-build -W`).
nitpicky = True
nitpick_ignore_regex = [
    # What layers pass to `odeint`, and nobody else.
    (r"py:class", r"keras_node\.(metrics\.SolverMetrics|jit_compile\.CompileLater)"),
    # Types of packages whose references are not loaded, so that the build needs no network.
    (
        r"py:.*",
        r"(tf|tensorflow|tensorflow_probability|tfp|keras|np|numpy|matplotlib|collections|typing|os|pathlib)\..*",
    ),
    (r"py:.*", r"(Any|Callable|Sequence|Iterable|Mapping|Axes|array-like|optional|callable|Path|PathLike)"),
]
suppress_warnings = ["mystnb.unknown_mime_type", "myst-nb.lexer"]  # the latter if no page is run
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # TensorFlow's log

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    "Input shape",
    "Output shape",
    "Masking",
    "Reference",
]

html_theme = "furo"
html_title = f"keras_node {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"

MODULES = {"plots": keras_node.plots, "utils": keras_node.utils}
PUBLIC = {name for name in keras_node.__all__ if name not in MODULES} | {
    f"{module}.{name}" for module, content in MODULES.items() for name in content.__all__
}


def code_or_link(role, rawtext, text, lineno, inliner, options=None, content=None):
    """The default role: what stands in single backticks in a docstring is code, and links to what is public here."""
    literal = nodes.literal(rawtext, text, classes=["code"])
    name = text.removesuffix("()").removeprefix("keras_node.")
    if name not in PUBLIC:
        return [literal], []
    reference = addnodes.pending_xref(
        rawtext, literal, refdomain="py", reftype="obj", reftarget=f"keras_node.{name}", refexplicit=True
    )
    return [reference], []


def visit_math(translator, node):
    """Writes an equation as MathML, which browsers draw themselves: no script, no font and no network."""
    block = isinstance(node, nodes.math_block)
    source = node.astext()
    try:
        mathml = tex2mathml(source, as_block=block)
    except MathError as error:
        raise ValueError(f"docutils cannot write this equation as MathML: {source!r}") from error
    translator.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def constructor(app, what, name, thing, options, signature, return_annotation):
    """The arguments of a class. Sphinx would show those of `__new__`, which Keras gives its layers."""
    if what != "class" or issubclass(thing, tuple | enum.Enum):
        return None
    if thing.__init__ is object.__init__:
        return "()", None
    arguments = inspect.signature(thing.__init__)
    arguments = arguments.replace(
        parameters=list(arguments.parameters.values())[1:], return_annotation=inspect.Signature.empty
    )
    return stringify_signature(arguments, unqualified_typehints=True), None


def function(app, what, name, thing, options, signature, return_annotation):
    """Tensors have their public name in the signature of a function."""
    if what not in ("function", "method") or signature is None:
        return None
    private = "tensorflow.python.framework.tensor.Tensor"
    return tuple(text and text.replace(private, "tf.Tensor") for text in (signature, return_annotation))


def describe_pictures(app, doctree):
    """Says of a picture that a cell draws where it stands, for those who cannot see it."""
    for picture in doctree.findall(nodes.image):
        section = picture.parent
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        if "alt" not in picture and section is not None:
            title = section.next_node(nodes.title).astext()
            picture["alt"] = f"What the code above draws, in the section {title}"


def setup(app):
    """Adds the role, the arguments of classes and the writer of equations."""
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-process-signature", function)
    app.connect("doctree-read", describe_pictures)
    from docutils.parsers.rst import roles

    roles.register_local_role("code-or-link", code_or_link)
    app.config.default_role = "code-or-link"
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
