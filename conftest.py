"""What the examples in docstrings may use without importing it, and how often Python collects garbage."""

import gc

import keras
import pytest
import tensorflow as tf

import keras_node

# A graph is made of many small objects, and to look for garbage among them as often as Python does takes time.
gc.set_threshold(200_000, 100, 100)


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace):
    doctest_namespace.update(keras=keras, keras_node=keras_node, tf=tf)
