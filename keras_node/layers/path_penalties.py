"""Penalties on the path of a solve, which make it cheaper to follow.

Both are estimated at one random time of the solve, whose state the solve returns along with the others. So they take a
few evaluations of the field, whatever the solver, its gradient and the number of steps.

References:
    Finlay, Jacobsen, Nurbekyan & Oberman (2020), "How to Train Your Neural ODE: the World of Jacobian and Kinetic
    Regularization", arXiv:2002.02798: the kinetic energy.
    Pal, Ma, Shah & Rackauckas (2021), "Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing
    Internal Solver Heuristics", ICML: the error estimates.
    Pal, Edelman & Rackauckas (2023), "Locally Regularized Neural Differential Equations: Some Black Boxes Were Meant to
    Remain Closed!", arXiv:2303.02262: random times.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.arguments import number
from keras_node.clock import merge, pick, reorder
from keras_node.solution import Solution
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates, rk_step
from keras_node.step_size import error_scale, rms_norm
from keras_node.times import Times, prepare_times
from keras_node.trees import Nest
from keras_node.vector_field import VectorField


class RandomTime(NamedTuple):
    """A random time among the times of a solve.

    Attributes:
        t: the time, a scalar, or `(batch,)` if samples have their own times.
        ts: the times of the solve with this one among them, `(T + 1,)` or `(T + 1, batch)`.
        index: where it is among them, in the shape of `t`.
        others: where the other times are among them, `(T,)` or `(T, batch)`.
    """

    t: tf.Tensor
    ts: tf.Tensor
    index: tf.Tensor
    others: tf.Tensor

    def without(self, ys: Nest) -> Nest:
        """The states at the other times."""
        return tf.nest.map_structure(lambda y: reorder(y, self.others), ys)


@dataclasses.dataclass(frozen=True)
class PathPenalties:
    """The weighted sum of two penalties on the path of a solve.

    Args:
        kinetic_energy: weight of the integral of `||f||^2` over time, the mean over samples.
        local_error: weight of the length of a mean step, relative to the length that its estimated error allows.
    """

    kinetic_energy: float
    local_error: float

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            if not 0 <= number(name, weight) < math.inf:
                raise ValueError(f"`{name}` must be a finite number, 0 or more. Received: {name}={weight!r}")

    def __bool__(self) -> bool:
        return bool(self.kinetic_energy > 0 or self.local_error > 0)

    def check(self, solver: RungeKutta, hybrid: bool, asked_for_times: bool) -> None:
        """Raises for a solve on whose path there can be no penalty.

        Args:
            solver: the solver.
            hybrid: whether there are events or jumps.
            asked_for_times: whether the call asks for times of its own.
        """
        weights = f"kinetic_energy={self.kinetic_energy}, local_error={self.local_error}"
        if hybrid:
            raise ValueError(
                "A penalty at a random time does not see how an event or a jump moves in time, so its gradient would "
                "be wrong: leave out the events and jumps, or `kinetic_energy` and `local_error`. "
                f"Received: {weights}"
            )
        if solver.num_steps is not None and asked_for_times:
            raise ValueError(
                "With `ts`, `num_steps` counts the steps from one time to the next, so that another time would change "
                f"the steps: give the solver a `step_size` instead. Received: solver={solver!r} with {weights}"
            )
        if not self.local_error:
            return
        if not solver.tableau.embedded:
            raise ValueError(
                f"Method {solver.method!r} has no error estimate for `local_error`: use another method, such as "
                f'"bosh3" or "tsit5", or `kinetic_energy`. Received: local_error={self.local_error}'
            )
        if solver.tableau.implicit:
            raise ValueError(
                "The error estimate of an implicit method is multiplied by an inverse that has no derivative, so "
                "`local_error` needs an explicit method; `kinetic_energy` works with every method. "
                f"Received: local_error={self.local_error} with the implicit method {solver.method!r}"
            )
        if solver.step_at:
            raise ValueError(
                "A step from a random time may contain one of the times in `step_at`, where its error estimate means "
                "nothing: use `kinetic_energy` instead of `local_error`. "
                f"Received: local_error={self.local_error} with step_at={solver.step_at}"
            )

    def solve(self, layer: Any, vector_field: Any, y0: Nest, times: Times, **options: Any) -> Solution:
        """Solves with the options of a layer, and adds the penalty to the losses of the layer.

        Args:
            layer: a `SolvingLayer` with a `seed_generator`.
            vector_field: the field.
            y0: the initial state.
            times: the times of the solve.
            **options: more options of the solve.

        Returns:
            The solution at `times`.
        """
        time = random_time(times, layer.variable_dtype, layer.seed_generator)
        solver = layer.solver
        if solver.num_steps is not None:
            solver = _with_step_size(solver, abs(times[1] - times[0]))

        def add_penalty(field: VectorField, solution: Solution) -> None:
            # Keras adds up losses in this precision.
            layer.add_loss(tf.cast(self(field, solver, time, solution), keras.config.floatx()))

        solution = layer.options.solve(vector_field, y0, time.ts, solver=solver, on_solution=add_penalty, **options)
        return solution._replace(ts=time.without(solution.ts), ys=time.without(solution.ys))

    def __call__(self, field: VectorField, solver: RungeKutta, time: RandomTime, solution: Solution) -> tf.Tensor:
        """Returns the penalty on a solve whose times are `time.ts`."""
        y = tf.nest.map_structure(lambda y: pick(y, time.index), solution.ys)
        leaf = tf.nest.flatten(y)[0]
        t, first, last = time.t, time.ts[0], time.ts[-1]
        if solver.per_sample and t.shape.rank == 0:
            t, first, last = (tf.fill(tf.shape(leaf)[:1], x) for x in (t, first, last))
        # Differences are formed in the precision of the times.
        duration, ahead = (tf.cast(x, leaf.dtype) for x in (last - first, last - t))
        t = tf.cast(t, leaf.dtype)
        rate = field(t, y, field.params)
        penalty = tf.zeros([], leaf.dtype)
        if self.kinetic_energy:
            penalty += self.kinetic_energy * _mean(tf.abs(duration) * _squared_norm(rate))
        if self.local_error:
            length = tf.math.divide_no_nan(tf.abs(duration), tf.cast(solution.stats.num_steps, leaf.dtype))
            # The field is known from the first time to the last, so a step ends there.
            dt = tf.sign(ahead) * tf.minimum(tf.stop_gradient(length), tf.abs(ahead))
            step = rk_step(solver, lambda t, y: Rates(field(t, y, field.params)), t, dt, y, k1=Rates(rate))
            largest = trees.each(lambda a, b: tf.maximum(tf.abs(a), tf.abs(b)), step.y0, step.y1)
            # Without this, the state would grow to make its relative error small.
            scale = trees.stop_gradient(error_scale(largest, solver.rtol, solver.atol))
            error = trees.each(tf.realdiv, step.error, scale)
            penalty += self.local_error * _mean(_relative_length(error, solver))
        return penalty


def random_time(ts: Times, dtype: str, seed: keras.random.SeedGenerator) -> RandomTime:
    """Draws a time uniformly between the first and the last of `ts`.

    Args:
        ts: the times of a solve, `(T,)` or `(T, batch)`. Samples with times of their own share the fraction.
        dtype: the precision of the variables of the layer.
        seed: the seed, which moves on.
    """
    dtype = "float64" if dtype == "float64" else "float32"  # the state has this precision in a solve
    ts = prepare_times(ts, dtype, axis=0)
    fraction = tf.cast(keras.random.uniform((), dtype=dtype, seed=seed), ts.dtype)
    t = ts[0] + fraction * (ts[-1] - ts[0])
    merged, others = merge(ts, t[None])
    # All places together are 0, 1, ..., T, so the place that is left is their sum without the others.
    number = tf.shape(ts)[0]
    index = number * (number + 1) // 2 - tf.reduce_sum(others, axis=0)
    return RandomTime(t, merged, index, others)


def _with_step_size(solver: RungeKutta, duration: float) -> RungeKutta:
    """Returns a solver that takes the same steps over this time if one more time lies within it."""
    assert solver.num_steps is not None
    if duration == 0:
        return solver
    # A solve of the adjoint begins again at the time in between, so it may take a step more.
    step_size, max_steps = duration / solver.num_steps, solver.num_steps + 1
    return dataclasses.replace(solver, num_steps=None, step_size=step_size, max_steps=max_steps)


def _mean(x: tf.Tensor) -> tf.Tensor:
    # With several devices, one of them may get no samples.
    return tf.math.divide_no_nan(tf.reduce_sum(x), tf.cast(tf.size(x), x.dtype))


def _squared_norm(x: Nest) -> tf.Tensor:
    """The sum of the squares of each sample."""
    return trees.total(
        [tf.reduce_sum(tf.square(leaf), axis=list(range(1, leaf.shape.rank))) for leaf in tf.nest.flatten(x)]
    )


# A step that may be ten times as long is no reason to change the field: its error may be rounding.
_NEGLIGIBLE = 0.1


def _relative_length(error: Nest, solver: RungeKutta) -> tf.Tensor:
    """The length of a step, relative to the length at which its error would be as large as the tolerances allow.

    Args:
        error: the estimated error of the step, in units of the tolerances.
        solver: the solver. With `per_sample`, every sample has its own length.
    """
    order = solver.tableau.error_order
    assert order is not None  # there is an error estimate
    negligible = rms_norm(trees.stop_gradient(error), solver.per_sample) < _NEGLIGIBLE**order
    # The gradient of a norm is NaN at zero, even where it is not selected.
    error = trees.each(lambda e: tf.where(trees.align(negligible, e), tf.ones_like(e), e), error)
    length = rms_norm(error, solver.per_sample) ** (1 / order)
    return tf.where(negligible, tf.constant(_NEGLIGIBLE, length.dtype), length)
