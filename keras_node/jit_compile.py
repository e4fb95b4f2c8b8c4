"""Whether to compile a solve with XLA inside a graph that is not compiled as a whole."""

from typing import Any

import tensorflow as tf

from keras_node.gradients.direct import DirectGradient
from keras_node.pure_function import PureFunction

# The names of convolutions begin with these, as do those of their gradients and of transposed convolutions.
_CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv2d")


def check_jit_compile(jit_compile: bool | str, gradient: Any) -> None:
    """Raises an error for an unknown value, and for `True` with a gradient that needs the steps of the solve."""
    if jit_compile not in (True, False, "auto"):
        raise ValueError(f'`jit_compile` must be `True`, `False` or "auto". Received: jit_compile={jit_compile!r}')
    if jit_compile is True and isinstance(gradient, DirectGradient):
        raise ValueError(
            'With gradient="direct" a solve cannot be compiled separately. Compile the function or the model around '
            "it, by `tf.function(jit_compile=True)` or `model.compile(jit_compile=True)`, or use another gradient. "
            'Received: jit_compile=True with gradient="direct"'
        )


def compiles(jit_compile: bool | str, gradient: Any, training: bool | None, pure: PureFunction) -> bool:
    """Whether this value of `jit_compile` compiles a solve. `pure` is the function that the program evaluates."""
    if tf.executing_eagerly() or jit_compile != "auto":
        return jit_compile is True
    if not training or isinstance(gradient, DirectGradient):
        return False
    # From the same seed, TensorFlow draws different numbers inside and outside an XLA program. And if a program closes
    # over a tensor, TensorFlow differentiates the program itself.
    if pure.draws_noise or pure.closes_over:
        return False
    return _accelerated() or not _convolves(pure.trace)


def _accelerated() -> bool:
    """Whether there is a device other than a CPU."""
    return any(device.device_type in ("GPU", "TPU") for device in tf.config.list_logical_devices())


def _convolves(function: tf.types.experimental.ConcreteFunction) -> bool:
    """Whether there are convolutions in a concrete function.

    On a CPU, XLA has a fast routine for convolutions in the layout of a forward one. It brings the gradients of a
    convolution into this layout only in the outermost computation. Inside the loop of a solve they run as plain nested
    loops, tens of times slower than in TensorFlow.
    """
    graph = function.graph.as_graph_def()
    nodes = [graph.node, *(inner.node_def for inner in graph.library.function)]
    return any(node.op.startswith(_CONVOLUTIONS) for group in nodes for node in group)
