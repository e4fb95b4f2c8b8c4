"""Random numbers of tests, names that the examples in docstrings may use, and when memory is given back."""

import ctypes
import functools
import gc
import sys

import pytest

# A graph is made of many small objects, and to look for garbage among them as often as Python does takes time.
gc.set_threshold(200_000, 100, 100)


@pytest.fixture(autouse=True, scope="module")
def _memory_of_a_module():
    """Returns the memory of graphs and compiled programs to the machine. Two workers need all of it."""
    yield
    gc.collect()
    gc.freeze()  # what is left stays, and to look at it again after every module takes a second or two
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run():
    """A test that passes today passes tomorrow, and alone as well as after others."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _traced_once(request, monkeypatch):
    """Creates the variables of an optimizer before `fit`, since most of the time of tests is tracing.

    Keras creates them in the first trace of a training step, and then TensorFlow traces the step again. Tests with the
    mark `traced_twice` do the same.
    """
    if "traced_twice" in request.keywords:
        return
    import keras

    fit = keras.Model.fit

    @functools.wraps(fit)
    def with_optimizer(model, *args, **kwargs):
        optimizer = getattr(model, "optimizer", None)
        if model.built and optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", with_optimizer)


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace):
    # These are imported here because the process that only distributes the tests among workers does not need them.
    import keras
    import tensorflow as tf

    import keras_node

    doctest_namespace.update(keras=keras, keras_node=keras_node, tf=tf)
