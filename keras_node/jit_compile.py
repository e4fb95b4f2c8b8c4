"""Whether, and when, to compile a solve with XLA inside a graph that is not compiled as a whole."""

from typing import Any

import keras
import tensorflow as tf

from keras_node.gradients.direct import DirectGradient
from keras_node.pure_function import PureFunction

# The names of convolutions begin with these, as do those of their gradients and of transposed convolutions.
_CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv2d")


class CompileLater:
    """Takes the place of `"auto"` in a layer, which can count: on a CPU it compiles after `SOLVES` solves in training.

    XLA takes seconds to compile a solve and its gradient, and then saves some hundredths of a second at every solve. So
    a short training ends sooner without it. Batches that are smaller than the largest one are not compiled: the last
    one of an epoch would take as long to compile as all the others, and runs once in an epoch.
    """

    SOLVES = 200

    def __init__(self) -> None:
        self.largest_and_solves: tf.Variable | None = None
        if tf.inside_function():
            return  # a `tf.function` makes its layers anew at each tracing, and must not make variables more than once
        # The size of the largest batch so far, and the number of its solves. Every replica counts for itself.
        self.largest_and_solves = tf.Variable(
            [0, 0],
            trainable=False,
            dtype=tf.int64,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def count(self, state: tf.Tensor, number: int | tf.Tensor) -> bool | tf.Tensor:
        """Counts a number of solves from a state, and returns whether to run them compiled."""
        if self.largest_and_solves is None:
            return True
        batch = tf.shape(state, tf.int64)[0] if state.shape.rank else tf.constant(1, tf.int64)
        largest, solves = tf.unstack(tf.convert_to_tensor(self.largest_and_solves))
        solves = tf.where(batch > largest, tf.zeros_like(solves), solves)
        solves = tf.where(batch < largest, solves, solves + tf.cast(number, tf.int64))
        largest = tf.maximum(largest, batch)
        self.largest_and_solves.assign(tf.stack([largest, solves]))
        return (batch == largest) & (solves > self.SOLVES)


def check_jit_compile(jit_compile: bool | str | CompileLater, gradient: Any) -> None:
    """Raises an error for an unknown value, and for `True` with a gradient that needs the steps of the solve."""
    if not isinstance(jit_compile, CompileLater) and jit_compile not in (True, False, "auto"):
        raise ValueError(f'`jit_compile` must be `True`, `False` or "auto". Received: jit_compile={jit_compile!r}')
    if jit_compile is True and isinstance(gradient, DirectGradient):
        raise ValueError(
            'With gradient="direct" a solve cannot be compiled separately. Compile the function or the model around '
            "it, by `tf.function(jit_compile=True)` or `model.compile(jit_compile=True)`, or use another gradient. "
            'Received: jit_compile=True with gradient="direct"'
        )


def compiles(
    jit_compile: bool | str | CompileLater,
    gradient: Any,
    training: bool | None,
    pure: PureFunction,
    state: tf.Tensor,
    number: int | tf.Tensor = 1,
) -> bool | tf.Tensor:
    """Whether to compile a solve. The answer is a tensor if it changes as the graph runs.

    Args:
        jit_compile: the option of the solve.
        gradient: the gradient method.
        training: whether the solve is part of training.
        pure: the function that the program evaluates.
        state: a state, which tells the number of samples.
        number: how many solves follow one after the other.
    """
    if tf.executing_eagerly() or jit_compile in (True, False):
        return jit_compile is True
    if not training or isinstance(gradient, DirectGradient):
        return False
    # From the same seed, TensorFlow draws different numbers inside and outside an XLA program. And if a program closes
    # over a tensor, TensorFlow differentiates the program itself.
    if pure.draws_noise or pure.closes_over:
        return False
    if _accelerated():
        return True
    if _convolves(pure):
        return False
    # A function without side effects cannot count. The field of another solve is one, and so is a stateless call.
    return jit_compile.count(state, number) if isinstance(jit_compile, CompileLater) and not _is_stateless() else True


def _is_stateless() -> bool:
    """Whether this code runs in a `keras.StatelessScope`."""
    with keras.StatelessScope() as scope:
        return scope.original_scope is not None


def _accelerated() -> bool:
    """Whether there is a device other than a CPU."""
    return any(device.device_type in ("GPU", "TPU") for device in tf.config.list_logical_devices())


def _convolves(pure: PureFunction) -> bool:
    """Whether there are convolutions in a function.

    On a CPU, XLA has a fast routine for convolutions in the layout of a forward one. It brings the gradients of a
    convolution into this layout only in the outermost computation. Inside the loop of a solve they run as plain nested
    loops, tens of times slower than in TensorFlow.
    """
    return any(node.op.startswith(_CONVOLUTIONS) for node in pure.nodes)
