"""A step that can be undone, made of the steps of any explicit Runge-Kutta method.

The solve carries a second state `z`, the companion of `y`. With the change `psi(t, dt, y)` of one step of the method,

    y1 = c y0 + (1 - c) z0 + psi(t, dt, z0)
    z1 = z0 - psi(t + dt, -dt, y1)

where the coupling `c` is a little less than 1. The solution begins with `z = y`, and the order is that of the method.
From `y1` and `z1` follow first `z0` and then `y0`.

A symplectic method needs no companion: a step backward undoes a step exactly.

Reference:
    McCallum & Foster (2024), "Efficient, Accurate and Stable Gradients for Neural ODEs", arXiv:2410.11648.
"""

from collections.abc import Callable

import tensorflow as tf

from keras_node import trees
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates, Step, rk_step
from keras_node.trees import Nest


def reversible_step(
    solver: RungeKutta,
    vector_field: Callable[[tf.Tensor, Nest], Rates],
    t: tf.Tensor,
    dt: tf.Tensor,
    y0: Nest,
    companion: Nest,
    coupling: float,
) -> Step:
    """Computes one step of the state and its companion.

    The error estimate, the stages and the dense output are those of the step `psi(t, dt, z0)`, and the `y0` of the
    result is the state from which they lead to `y1`. A step of length zero changes nothing.
    """
    forward = rk_step(solver, vector_field, t, dt, companion)
    start = mixture(y0, companion, dt, coupling)
    y1 = trees.add(start, change(solver.tableau, forward))
    backward = rk_step(solver, vector_field, tf.add(t, dt), tf.negative(dt), y1, last_rate=False)
    z1 = trees.each(tf.subtract, companion, change(solver.tableau, backward))
    return forward._replace(y0=start, y1=y1, companion=z1)


def change(tableau: ButcherTableau, step: Step) -> Nest:
    """By how much a Runge-Kutta step changes the state."""
    # A step that is first same as last does not use the rate at its end, which may be missing. And there may be more
    # rates, which only the dense output uses.
    rates = step.k[: tableau.num_stages]
    return trees.scale(step.dt, trees.weighted_sum(tableau.b[: len(rates)], [rate.y for rate in rates]))


def mixture(y: Nest, companion: Nest, dt: tf.Tensor, coupling: float) -> Nest:
    """Returns `c y + (1 - c) z`, or `y` for a step of length zero."""
    difference = trees.each(tf.subtract, companion, y)
    return trees.add(y, trees.scale(mixed_part(dt, coupling), difference))


def mixed_part(dt: tf.Tensor, coupling: float) -> tf.Tensor:
    """Returns `1 - c`, or 0 for a step of length zero."""
    return tf.where(tf.equal(dt, 0), tf.zeros_like(dt), 1 - coupling)
