"""The stages of an implicit Runge-Kutta step by Newton's method.

Every stage after the first is the solution `k_i` of

    k_i = f(t + c_i dt, y + dt sum_j a_ij k_j),    a_ii = gamma

where the sum ends with `j = i`. With the Jacobian `J = df/dy` at the start of the step, an iteration is

    k_i <- k_i + (1 - gamma dt J)^-1 (f(t + c_i dt, y + dt sum_j a_ij k_j) - k_i)

All stages of a step share the matrix, which is inverted once. The samples of a batch do not influence each other, so
each has its own Jacobian `(n, n)`, and iterates until it has converged itself.

The derivative of the stages follows from the implicit function theorem. Take all of them as constants `k`, and let
`r_i` be the residual above, with the dependence of `f` on everything else. Then

    k_i + d_i,    d_i = (1 - gamma dt J_i)^-1 (r_i + dt J_i sum_j a_ij d_j)

with the Jacobian `J_i` at each stage, which counts as a constant, has the right values (`r_i` is zero) and the right
first derivative. Doing the same again from there gives the right second derivative. So ordinary backpropagation is
exact, and it does the transposed solves of the adjoint.

References:
    Hairer & Wanner (1996), "Solving Ordinary Differential Equations II", IV.8: iteration and stopping.
    Kennedy & Carpenter (2016), NASA/TM-2016-219173, section 5.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_node import trees
from keras_node.clock import Segment
from keras_node.solvers.inverse import inverse
from keras_node.solvers.rows import Rows
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.step_size import error_scale
from keras_node.trees import Nest

Field = Callable[[tf.Tensor, Nest], Nest]  # f(t, y)
Jacobian = Callable[[tf.Tensor, Nest], tf.Tensor]  # df/dy(t, y)


class ConstantField(NamedTuple):
    """A field with constant parameters, for everything that is not differentiated.

    A loop that contains nothing a tape watches takes TensorFlow far less time to trace.

    Attributes:
        rates: `f(t, y)`.
        jacobian: `df/dy(t, y)` if it is given, `(batch, n, n)`, or `(n, n)` if it is the same for all samples.
    """

    rates: Field
    jacobian: Jacobian | None = None

    def inside(self, segment: Segment) -> "ConstantField":
        """Returns the same field at times that are moved off the ends of a segment."""
        if segment.kinks is None:
            return self
        # A Jacobian that is given is evaluated at the start of a step only, which is moved off already.
        return self._replace(rates=lambda t, y: self.rates(segment.inside(t), y))


# A graph holds one vector-Jacobian product for each row, up to this number. More rows are computed in a loop, which
# evaluates the field again for every row.
_MOST_UNROLLED = 32


class Convergence(NamedTuple):
    """How Newton's method went in a step: scalars, or `(batch,)` with per-sample steps.

    Attributes:
        stages: the rates at all stages, as constants, `(stages, batch, n)`.
        converged: whether it converged at all stages.
        num_iterations: the number of iterations at all stages.
    """

    stages: tf.Tensor
    converged: tf.Tensor
    num_iterations: tf.Tensor


class Iterations(NamedTuple):
    """The iterations of a step so far, one value for each sample.

    Attributes:
        converged: whether all stages have converged.
        contraction: the factor by which the last iteration reduced the change.
        count: the number of iterations.
    """

    converged: tf.Tensor
    contraction: tf.Tensor
    count: tf.Tensor


class Newton:
    """Computes the stages of one step.

    Args:
        solver: the method, the tolerances and the options of the iterations.
        field: `f(t, y)`.
        t, dt, y0: the start of the step, its length, and the state there.
        constant_field: the same field with constant parameters. The derivative of the stages does not use its Jacobian,
            which need not be exact.
    """

    def __init__(
        self,
        solver: RungeKutta,
        field: Field,
        t: tf.Tensor,
        dt: tf.Tensor,
        y0: Nest,
        constant_field: ConstantField | None = None,
    ) -> None:
        self.solver = solver
        self.field = field
        self.constant_field = constant_field or ConstantField(field)
        self.rows = Rows(y0, has_batch=dt.shape.rank == 1)
        self.y0 = self.rows.join(y0)
        self.dt = dt if dt.shape.rank == 0 else dt[:, None]
        tableau, dtype = solver.tableau, dt.dtype
        nodes = tf.constant(np.reshape(tableau.c, [-1] + [1] * t.shape.rank), dtype)
        self.times = t + nodes * dt
        self.weights = tf.constant(tableau.matrix, dtype)

    def stages(
        self, k1: Nest, num_derivatives: int, known: tf.Tensor | None = None
    ) -> tuple[list[Nest], Convergence | None]:
        """Solves for the stages.

        Args:
            k1: the first stage, `f(t, y0)`.
            num_derivatives: how often you can differentiate the result by ordinary backpropagation.
            known: the stages as constants if they are known. Then nothing is iterated, and the `Convergence` is `None`.
        """
        first = self.rows.join(k1)
        convergence = self._solve(tf.stop_gradient(first)) if known is None else None
        constant = known if convergence is None else convergence.stages
        k = [first, *tf.unstack(constant, self.solver.tableau.num_stages)[1:]]
        if num_derivatives:
            k = self._differentiable(k, num_derivatives)
        return [self.rows.split(stage) for stage in k], convergence

    def damped(self, error: Nest) -> Nest:
        """Returns `(1 - gamma dt J)^-1 error`, which is small where the problem is stiff."""
        return self.rows.split(_times(self.inverse, self.rows.join(error)))

    def _solve(self, first: tf.Tensor) -> Convergence:
        """Solves for the stages as constants, from the first."""
        tableau = self.solver.tableau
        times, dt, y0 = trees.stop_gradient((self.times, self.dt, self.y0))
        self.inverse = self._inverse(
            self._jacobian(times[0], y0) if self.constant_field.jacobian is None else self._given(times[0], y0)
        )
        weights = self.weights - tf.linalg.diag(tf.linalg.diag_part(self.weights))
        guesses = [[*row, *[0.0] * (tableau.num_stages - len(row))] for row in ((), *tableau.guesses)]
        allowed = self.rows.join(error_scale(self.rows.split(y0), self.solver.rtol, self.solver.atol))
        # Below the rounding error of the state, iterations do not come closer.
        rounding = 10 * np.finfo(dt.dtype.as_numpy_dtype).eps
        allowed = self.solver.newton_tolerance * allowed + rounding * tf.abs(y0)
        numbers = tf.range(tableau.num_stages)

        def body(i: tf.Tensor, k: tf.Tensor, iterations: Iterations) -> tuple:
            base = y0 + dt * _combined(tf.gather(weights, i), k)
            guess = _combined(tf.gather(tf.constant(guesses, k.dtype), i), k)
            stage, iterations = self._iterate(tf.gather(times, i), dt, base, guess, allowed, iterations)
            # An update by index would fail for an empty batch.
            return i + 1, tf.where((numbers == i)[:, None, None], stage[None], k), iterations

        zeros = tf.zeros_like(y0[:, 0])
        start = Iterations(zeros == 0, zeros + 1, tf.zeros_like(zeros, dtype=tf.int32))
        others = [tf.zeros_like(first)] * (tableau.num_stages - 1)
        _, k, iterations = tf.while_loop(
            lambda i, *_: i < tableau.num_stages,
            body,
            (1, tf.stack([first, *others]), start),
            maximum_iterations=tableau.num_stages - 1,
        )
        converged, count = iterations.converged, iterations.count
        if not self.solver.per_sample:
            # The largest number of an empty batch is the lowest integer.
            converged, count = tf.reduce_all(converged), tf.maximum(tf.reduce_max(count), 0)
        return Convergence(tf.stop_gradient(k), converged, count)

    def _iterate(
        self, t: tf.Tensor, dt: tf.Tensor, base: tf.Tensor, guess: tf.Tensor, allowed: tf.Tensor, before: Iterations
    ) -> tuple[tf.Tensor, Iterations]:
        """One stage."""
        h = dt * self.solver.tableau.gamma

        def body(first: tf.Tensor, k: tf.Tensor, active: tf.Tensor, last: tf.Tensor, now: Iterations) -> tuple:
            change = _times(self.inverse, self._constant_rates(t, base + h * k) - k)
            size = tf.sqrt(tf.reduce_mean(tf.square(h * change / allowed), axis=1))
            # The first iteration has nothing to compare with. The stage before it had the same matrix.
            contraction = tf.where(first, now.contraction, size / last)
            bounded = tf.minimum(contraction, 0.999)
            done = size * bounded <= 1 - bounded
            failed = ~done & ~(tf.math.is_finite(size) & (first | (contraction < 1)))
            now = Iterations(
                now.converged & ~(active & failed),
                tf.where(active, contraction, now.contraction),
                now.count + tf.cast(active, tf.int32),
            )
            return False, tf.where(active[:, None], k + change, k), active & ~done & ~failed, size, now

        _, k, active, _, after = tf.while_loop(
            lambda first, k, active, *_: tf.reduce_any(active),
            body,
            (True, guess, before.converged, tf.ones_like(before.contraction), before),
            maximum_iterations=self.solver.max_newton_iterations,
        )
        return k, after._replace(converged=after.converged & ~active)

    def _differentiable(self, k: list[tf.Tensor], num_derivatives: int) -> list[tf.Tensor]:
        """The same stages with their derivatives."""
        weights = self.solver.tableau.matrix
        times, dt, y0, constant = trees.stop_gradient((self.times, self.dt, self.y0, tf.stack(k)))
        points = y0 + dt * tf.einsum("ij,jbn->ibn", self.weights, constant)
        numbers = tf.range(1, len(k))
        # TensorFlow would differentiate a loop whose inputs are constants if its result did not stop the gradient.
        jacobians = tf.stop_gradient(
            tf.map_fn(
                lambda i: self._jacobian(tf.gather(times, i), tf.gather(points, i)),
                numbers,
                fn_output_signature=tf.TensorSpec([*points.shape[1:], points.shape[2]], points.dtype),
            )
        )
        shape = tf.shape(jacobians)
        merged = tf.reshape(jacobians, [-1, *jacobians.shape[2:]])
        inverses = tf.reshape(self._inverse(merged, repeats=len(k) - 1), shape)
        jacobians, inverses = (tf.unstack(tf.ensure_shape(x, jacobians.shape)) for x in (jacobians, inverses))

        for _ in range(num_derivatives):
            changes = [tf.zeros_like(k[0])]
            for i in range(1, len(k)):
                row = weights[i, : i + 1].tolist()
                y = self.y0 + self.dt * trees.weighted_sum(row, k[: i + 1])
                residual = self._rates(self.times[i], y) - k[i]
                moved = dt * trees.weighted_sum(row[:-1], changes)
                change = _times(inverses[i - 1], residual + _times(jacobians[i - 1], moved))
                changes.append(change)
            k = [stage + change for stage, change in zip(k, changes, strict=True)]
        return k

    def _rates(self, t: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return self.rows.join(self.field(t, self.rows.split(y)))

    def _constant_rates(self, t: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return self.rows.join(self.constant_field.rates(t, self.rows.split(y)))

    def _inverse(self, jacobian: tf.Tensor, repeats: int = 1) -> tf.Tensor:
        """`(1 - gamma dt J)^-1`, a constant. With `repeats`, the batch of `J` is repeated."""
        h = tf.stop_gradient(self.dt) * self.solver.tableau.gamma
        if h.shape.rank:
            h = tf.tile(h, [repeats, 1])[..., None]
        return tf.stop_gradient(inverse(tf.eye(jacobian.shape[-1], dtype=jacobian.dtype) - h * jacobian))

    def _given(self, t: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """The Jacobian that the user gives, for every sample."""
        assert self.constant_field.jacobian is not None
        matrix, size = tf.cast(self.constant_field.jacobian(t, self.rows.split(y)), y.dtype), y.shape[1]
        shape = (size, size) if matrix.shape.rank == 2 else (y.shape[0], size, size)
        if not matrix.shape.is_compatible_with(shape):
            raise ValueError(
                f"A Jacobian must be of shape (batch, n, n), or (n, n) if it is the same for all samples. Here n is "
                f"{size}, the number of entries of a sample. Received: a Jacobian of shape {tuple(matrix.shape)} for a "
                f"state of shape {[tuple(leaf.shape) for leaf in tf.nest.flatten(self.rows.like)]}"
            )
        return tf.stop_gradient(tf.broadcast_to(matrix, [tf.shape(y)[0], size, size]))

    def _jacobian(self, t: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """The Jacobian, a constant. A vector-Jacobian product with a unit vector gives a row of it for all samples."""

        def rows(units: list[tf.Tensor]) -> list[tf.Tensor]:
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(y)
                rates = self._constant_rates(t, y)
            return [
                tape.gradient(rates, y, unit + tf.zeros_like(rates), tf.UnconnectedGradients.ZERO) for unit in units
            ]

        units = tf.eye(y.shape[1], dtype=y.dtype)
        if y.shape[1] <= _MOST_UNROLLED or tf.executing_eagerly():
            return tf.stop_gradient(tf.stack(rows(tf.unstack(units)), axis=1))
        return tf.stop_gradient(tf.transpose(tf.map_fn(lambda unit: rows([unit])[0], units), [1, 0, 2]))


def _combined(weights: tf.Tensor, stages: tf.Tensor) -> tf.Tensor:
    """The sum of stages `(stages, batch, n)`, multiplied by weights `(stages,)`."""
    return tf.reduce_sum(weights[:, None, None] * stages, axis=0)


def _times(matrices: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """The products of matrices `(batch, n, n)` and vectors `(batch, n)`."""
    return tf.matmul(matrices, rows[..., None])[..., 0]
