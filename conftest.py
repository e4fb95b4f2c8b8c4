"""What the examples in docstrings may use without importing it."""

import keras
import pytest
import tensorflow as tf

import keras_node


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace):
    doctest_namespace.update(keras=keras, keras_node=keras_node, tf=tf)
