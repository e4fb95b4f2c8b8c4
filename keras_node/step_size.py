"""The length of the next step: error norm, first step, constant steps and the PID controller.

Step sizes are positive lengths on the clock of the solve (see `clock.py`): scalars for a joint solve, and `(batch,)`
for per-sample steps. No gradient flows through a step size.

In eager mode, a Python operator on tensors takes several times as long as the function that it calls. This is why
`tf.multiply` and similar functions are used here.

References:
    Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", II.4: error norm and first step.
    Söderlind (2002), "Automatic control and adaptive time-stepping", Numer. Algorithms 31.
    Söderlind (2003), "Digital filters in adaptive time-stepping", ACM Trans. Math. Softw. 29(1).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.trees import Nest

Norm: TypeAlias = Callable[[Nest], tf.Tensor]


class Decision(NamedTuple):
    """The decision of a controller about an attempted step.

    Attributes:
        accept: whether to accept the step.
        finite: whether the error estimate is a finite number.
        step_size: the length of the next step to attempt.
        history: the memory of the controller for the next decision.
    """

    accept: tf.Tensor
    finite: tf.Tensor
    step_size: tf.Tensor
    history: tuple[tf.Tensor, ...]


Tolerance: TypeAlias = float | tuple[float, ...]  # one number, or one for each entry on the last axis of the state


def error_scale(y: Nest, rtol: Tolerance, atol: Tolerance) -> Nest:
    """The allowed error, `atol + rtol * |y|`."""
    return trees.each(lambda a: tf.add(tf.multiply(tf.abs(a), rtol), atol), y)


def rms_norm(x: Nest, per_sample: bool) -> tf.Tensor:
    """Root mean square over all elements of all leaves, or with `per_sample` over the elements of each sample."""
    total = sum_over(trees.each(tf.square, x), per_sample)
    count = sum(_size(leaf, int(per_sample)) for leaf in tf.nest.flatten(x))
    # A state without elements has the error zero.
    count = max(count, 1) if isinstance(count, int) else tf.cast(tf.maximum(count, 1), total.dtype)
    return tf.sqrt(tf.realdiv(total, count))


def rms_norm_of_moving(speed: tf.Tensor) -> Norm:
    """The root mean square over the samples whose `speed`, of shape `(batch,)`, is not zero.

    In a joint solve, samples at rest make no error. If they counted, the padding of a batch would hide the errors of
    the others.
    """
    moving = tf.cast(tf.not_equal(speed, 0), speed.dtype)
    share = tf.maximum(tf.reduce_sum(moving), 1) / tf.cast(tf.maximum(tf.size(speed), 1), speed.dtype)
    return lambda x: rms_norm(trees.scale(moving, x), per_sample=False) / tf.sqrt(share)


def sum_over(x: Nest, per_sample: bool) -> tf.Tensor:
    """The sum over all elements of all leaves, or with `per_sample` over the elements of each sample."""
    return trees.total(
        [
            tf.raw_ops.Sum(input=leaf, axis=np.arange(int(per_sample), leaf.shape.rank, dtype=np.int32))
            for leaf in tf.nest.flatten(x)
        ]
    )


def _size(x: tf.Tensor, first: int) -> int | tf.Tensor:
    """The number of elements on the axes from `first` on, as a Python integer if the shape is known."""
    size = x.shape[first:].num_elements()
    return tf.reduce_prod(tf.shape(x)[first:]) if size is None else size


def first_step_size(
    rate_of_change: Callable[[tf.Tensor, Nest], Nest],
    y0: Nest,
    k1: Nest,
    longest: tf.Tensor,
    controller: "PIDController",
    norm: Norm,
) -> tf.Tensor:
    """Chooses the first step by the algorithm of Hairer, Norsett & Wanner, II.4, which takes one evaluation.

    Args:
        rate_of_change: `g(reading, y)`, the derivative of the state with respect to the reading of the clock.
        y0: the initial state.
        k1: `g(0, y0)`.
        longest: the length of the solve. The trial step is not longer.
        controller: provides the tolerances and the order of the error estimate.
        norm: the norm of a state, one value or one for each sample.
    """
    scale = error_scale(y0, controller.rtol, controller.atol)

    def size(x: Nest) -> tf.Tensor:
        return norm(trees.each(tf.realdiv, x, scale))

    d0, d1 = size(y0), size(k1)
    h0 = tf.where((d0 < 1e-5) | (d1 < 1e-5), tf.constant(1e-6, d0.dtype), 0.01 * tf.math.divide_no_nan(d0, d1))
    h0 = tf.minimum(h0, longest)
    k2 = rate_of_change(h0, trees.add(y0, trees.scale(h0, k1)))
    d2 = tf.math.divide_no_nan(size(tf.nest.map_structure(tf.subtract, k2, k1)), h0)
    steepest = tf.maximum(d1, d2)
    h1 = tf.where(
        steepest <= 1e-15,
        tf.constant(1e-6, h0.dtype),  # not less than `h0 * 1e-3`, since `d1` is below 1e-5
        (0.01 / tf.maximum(steepest, 1e-15)) ** (1.0 / controller.error_order),
    )
    h = tf.minimum(tf.minimum(100 * h0, h1), longest)
    # If the trial step gives a value that is not finite, h0 is a careful choice: the first step may still be rejected.
    return tf.stop_gradient(tf.where(tf.math.is_finite(h), h, h0))


@dataclasses.dataclass(frozen=True)
class ConstantSteps:
    """Accepts every step and keeps its size."""

    def start(self, like: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The history before the first step, which is empty."""
        del like
        return ()

    def decide(
        self,
        step_size: tf.Tensor,
        error: Nest,
        y0: Nest,
        y1: Nest,
        history: tuple[tf.Tensor, ...],
        norm: Norm,
    ) -> Decision:
        """Accepts the step."""
        del error, y0, y1, norm
        always = tf.ones_like(step_size, tf.bool)
        return Decision(always, always, step_size, history)


@dataclasses.dataclass(frozen=True)
class PIDController:
    """Accepts a step if its error norm `e` is at most 1, and chooses the next step from the last error norms.

    The next step is the last one times the factor

    `safety * e[n] ** -((p + i + d) / q) * e[n-1] ** ((p + 2 d) / q) * e[n-2] ** -(d / q)`

    where `q` is `error_order` and `p`, `i`, `d` are the coefficients. The factor stays between `min_factor` and
    `max_factor`.
    """

    error_order: float
    rtol: Tolerance
    atol: Tolerance
    pcoeff: float
    icoeff: float
    dcoeff: float
    safety: float
    min_factor: float
    max_factor: float

    def start(self, like: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The history before the first step: ones, as many as the coefficients need past error norms."""
        depth = 2 if self.dcoeff else 1 if self.pcoeff else 0
        return (tf.ones_like(like),) * depth

    def decide(
        self,
        step_size: tf.Tensor,
        error: Nest,
        y0: Nest,
        y1: Nest,
        history: tuple[tf.Tensor, ...],
        norm: Norm,
    ) -> Decision:
        """Decides about a step of this size, with the estimated `error`, from the state `y0` to `y1`."""
        largest = trees.each(lambda a, b: tf.maximum(tf.abs(a), tf.abs(b)), y0, y1)
        size = tf.stop_gradient(norm(trees.each(tf.realdiv, error, error_scale(largest, self.rtol, self.atol))))
        # An error that is not finite counts as a very large one: a smaller step may stay in the domain of the field.
        finite = tf.math.is_finite(size)
        accept = size <= 1
        size = tf.where(finite, tf.maximum(size, 1e-10), 1e10)
        p, i, d = (c / self.error_order for c in (self.pcoeff, self.icoeff, self.dcoeff))
        exponents = (-(p + i + d), p + 2 * d, -d)
        factor, most = tf.multiply(tf.pow(size, exponents[0]), self.safety), self.max_factor
        for past, exponent in zip(history, exponents[1:], strict=False):
            factor = factor * past**exponent
        if history:
            # After a rejection the next step must be shorter, even if the history gives a longer one.
            most = tf.where(accept, tf.constant(most, size.dtype), self.safety)
        factor = tf.maximum(tf.minimum(factor, most), self.min_factor)
        new_history = (size, *history)[: len(history)]
        history = tuple(tf.where(accept, new, old) for new, old in zip(new_history, history, strict=True))
        return Decision(accept, finite, tf.multiply(step_size, factor), history)
