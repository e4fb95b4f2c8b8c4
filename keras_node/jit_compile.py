"""Whether to compile a solve with XLA inside a graph that is not compiled as a whole."""

from typing import Any

import tensorflow as tf

from keras_node.gradients.direct import DirectGradient
from keras_node.pure_function import PureFunction

# Beginnings of the names of operations: gradients, transposed and depthwise convolutions included.
_CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv2d")


def check_jit_compile(jit_compile: bool | str, gradient: Any) -> None:
    """Refuses what is not one of the choices, and what backpropagation cannot enter."""
    if jit_compile not in (True, False, "auto"):
        raise ValueError(f'`jit_compile` must be `True`, `False` or "auto". Received: jit_compile={jit_compile!r}')
    if jit_compile is True and isinstance(gradient, DirectGradient):
        raise ValueError(
            'With gradient="direct" a solve cannot be compiled by itself: compile what is around it, '
            "`tf.function(jit_compile=True)` or `model.compile(jit_compile=True)`, or use another gradient. "
            "Received: jit_compile=True"
        )


def compiles(jit_compile: bool | str, gradient: Any, training: bool | None, pure: PureFunction) -> bool:
    """What a choice comes to; `pure` is the function that the program evaluates."""
    if tf.executing_eagerly() or jit_compile != "auto":
        return jit_compile is True
    if not training or isinstance(gradient, DirectGradient):
        return False
    # From one seed TensorFlow draws other numbers in an XLA program than outside. And of a tensor that a program closes
    # over, it wants to differentiate the program itself.
    if pure.draws_noise or pure.closes_over:
        return False
    return _accelerated() or not _convolves(pure.trace)


def _accelerated() -> bool:
    return any(device.device_type in ("GPU", "TPU") for device in tf.config.list_logical_devices())


def _convolves(function) -> bool:
    """Whether there are convolutions in a concrete function.

    XLA on a CPU hands a convolution to a fast routine if it has the layout of a forward one, and brings the gradients
    of one into that layout in the outermost computation only: inside the loop of a solve they run as plain nested
    loops, tens of times slower than TensorFlow's.
    """
    graph = function.graph.as_graph_def()
    nodes = [graph.node, *(inner.node_def for inner in graph.library.function)]
    return any(node.op.startswith(_CONVOLUTIONS) for group in nodes for node in group)
