"""Keeps AutoGraph from rewriting the code of this package."""

import inspect
from collections.abc import Callable
from typing import TypeVar

import tensorflow as tf

Method = TypeVar("Method", bound=Callable)


def without_autograph(method: Method) -> Method:
    """Returns a method that AutoGraph does not rewrite inside a `tf.function`, nor anything that it calls.

    To rewrite and compile Python takes longer than to trace it, and nothing here needs it. But a subclass may override
    a method, with a Python `if` over tensors, so do not decorate a method that calls one of those.
    """
    kept = tf.autograph.experimental.do_not_convert(method)
    # If a function that wraps another one is an argument of a `tf.function`, TensorFlow passes the other one, and that
    # of a method has lost its object.
    kept.__signature__ = inspect.signature(method)
    del kept.__wrapped__
    return kept
