"""One Runge-Kutta step for any Butcher tableau, in the notation of Hairer, Norsett & Wanner (1993), II.1."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.phase_space import only
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.newton import ConstantField, Convergence, Newton
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.step_size import sum_over
from keras_node.trees import Nest


class Rates(NamedTuple):
    """What a vector field returns to the solver.

    A quadrature is a state that the right-hand side does not read. So it needs no values at the stages, only the
    weighted sum over an accepted step, and it is not part of the error estimate. It is integrated over time; if time
    has a different speed in every sample, it is integrated over the clock, because the samples share a quadrature.

    Attributes:
        y: the rate of change `dy/dt` of the state.
        quadrature: the rates of the quadratures.
    """

    y: Nest
    quadrature: Nest = ()


class Step(NamedTuple):
    """A step from `(t, y0)` over `dt` to `y1`.

    Attributes:
        t: the time at the start of the step.
        dt: the signed length of the step.
        y0: the state at `t`.
        y1: the state at `t + dt`.
        error: the embedded estimate of the local error of `y1`, or `None` if there is no estimate. It is NaN if
            Newton's method did not converge.
        k: the `Rates` at every stage. With `with_dense_stages`, also those at the further stages.
        stages: the pairs `(time, state)` at which they were evaluated; of an implicit method the first one only.
        vector_field: the field, for further stages.
        convergence: of an implicit method, how Newton's method went; otherwise `None`.
        companion: of a reversible step, the second state at `t + dt` (see `reversible_step`); otherwise `()`.
    """

    t: tf.Tensor
    dt: tf.Tensor
    y0: Nest
    y1: Nest
    error: Nest | None
    k: list[Rates]
    stages: list[tuple[tf.Tensor, Nest]]
    vector_field: Callable[[tf.Tensor, Nest], Rates]
    convergence: Convergence | None = None
    companion: Nest = ()


def rk_step(
    solver: RungeKutta,
    vector_field: Callable[[tf.Tensor, Nest], Rates],
    t: tf.Tensor,
    dt: tf.Tensor,
    y0: Nest,
    k1: Rates | None = None,
    last_rate: bool = True,
    constant_field: ConstantField | None = None,
    num_derivatives: int = 0,
    known_stages: tf.Tensor | None = None,
) -> Step:
    """Computes one step.

    Args:
        solver: the method, and for an implicit one the options of Newton's method.
        vector_field: `f(t, y)`.
        t: the time at the start of the step, a scalar or `(batch,)`.
        dt: the signed length of the step, in the same shape.
        y0: the state at `t`.
        k1: `f(t, y0)` if it is known already (first same as last).
        last_rate: whether an explicit method that is first same as last evaluates the field at `y1`. Without this
            evaluation, the step has no error estimate and no dense output.
        constant_field: for an implicit method, the same field with constant parameters.
        num_derivatives: how often you can differentiate a step of an implicit method, by ordinary backpropagation. A
            step of an explicit method can always be differentiated.
        known_stages: the stages of this step of an implicit method if they have been computed before, those of a
            `Convergence`. The step has no error estimate then.
    """
    tableau = solver.tableau

    def moved_by(weights: Sequence[float], k: list[Rates]) -> Nest:
        return _moved(y0, dt, weights, k)

    def rates_at(i: int, t: tf.Tensor, y: Nest) -> Rates:
        rates = vector_field(t, y)
        return rates._replace(y=only(tableau.halves[i], rates.y, y)) if tableau.symplectic else rates

    k = [rates_at(0, t, y0) if k1 is None else k1]
    stages, newton, convergence = [(t, y0)], None, None
    if tableau.implicit:
        newton = Newton(solver, lambda t, y: vector_field(t, y).y, t, dt, y0, constant_field)
        rates, convergence = newton.stages(k[0].y, num_derivatives, known_stages)
        k = [Rates(rate) for rate in rates]
        y1 = moved_by(tableau.b, k)
    else:
        # The times of all stages are computed at once, because in eager mode every operation takes time.
        c = np.reshape(tableau.c[1:], [-1] + [1] * t.shape.rank)
        times = tf.unstack(tf.add(t, tf.multiply(tf.constant(c, t.dtype), dt)), len(c))
        for a, time in zip(tableau.a, times, strict=True):
            stages.append((time, moved_by(a, k)))
            if last_rate or not tableau.fsal or len(stages) < tableau.num_stages:
                k.append(rates_at(len(k), *stages[-1]))
        y1 = stages[-1][1] if tableau.fsal else moved_by(tableau.b, k)
    error = None
    if tableau.b_error is not None and len(k) == tableau.num_stages and known_stages is None:
        error = trees.scale(dt, trees.weighted_sum(tableau.b_error, [rates.y for rates in k]))
        if newton is not None and convergence is not None:
            error = trees.poison(~convergence.converged, newton.damped(error))
    return Step(t, dt, y0, y1, error, k, stages, vector_field, convergence)


def with_dense_stages(tableau: ButcherTableau, step: Step, needed: tf.Tensor) -> Step:
    """Adds the rates at the further stages of the dense output, or zeros if they are not needed."""
    if not tableau.a_dense:
        return step

    def evaluate() -> list[Nest]:
        k = list(step.k)
        _, start = step.stages[0]
        for a, c in zip(tableau.a_dense, tableau.c_dense, strict=True):
            y = _moved(start, step.dt, a, k)
            k.append(step.vector_field(tf.add(step.t, tf.multiply(step.dt, c)), y))
        return [rates.y for rates in k[tableau.num_stages :]]

    def skip() -> list[Nest]:
        return [tf.nest.map_structure(tf.zeros_like, step.y0)] * len(tableau.a_dense)

    return step._replace(k=[*step.k, *[Rates(y) for y in tf.cond(needed, evaluate, skip)]])


def _moved(y0: Nest, dt: tf.Tensor, weights: Sequence[float], k: list[Rates]) -> Nest:
    """The state at a stage, `y0 + dt sum_j a_j k_j`."""
    increment = trees.weighted_sum(weights, [rates.y for rates in k])
    return trees.add(y0, trees.scale(dt, increment))


# A step from this part of the longest stable step on counts as bound by stability. Where accuracy bounds the steps,
# hardly any is so long.
_NEAR_LIMIT = 0.7


def is_bound_by_stability(tableau: ButcherTableau, step: Step, per_sample: bool) -> tf.Tensor:
    """Whether a step of an explicit method is about as long as its stability allows, the sign of a stiff problem.

    The rates at the last two stages tell how steep the field is where the step ends. Reference: Hairer & Wanner (1996),
    "Solving Ordinary Differential Equations II", IV.2.
    """
    (_, before), (_, last) = step.stages[-2:]
    moved = sum_over(trees.each(tf.math.squared_difference, last, before), per_sample)
    change = trees.scale(step.dt, trees.each(tf.subtract, step.k[-1].y, step.k[-2].y))
    changed = sum_over(trees.each(tf.square, change), per_sample)
    return changed > tf.multiply(moved, (_NEAR_LIMIT * tableau.stability_limit) ** 2)


def quadrature_rate(tableau: ButcherTableau, step: Step) -> Nest:
    """The mean rates of the quadratures over a step. The step changes a quadrature by `dt` times its mean rate."""
    return trees.weighted_sum(tableau.b, [rates.quadrature for rates in step.k])
