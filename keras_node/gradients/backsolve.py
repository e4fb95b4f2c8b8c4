"""The adjoint method: the gradient is the solution of a second ODE, solved backward in time."""

import copy
import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_node import solvers, trees
from keras_node.arguments import positive_integer
from keras_node.clock import Clock, merge, reorder
from keras_node.gradients.custom_vjp import Gradients, solve_with_gradient
from keras_node.gradients.loss_times import loss_by_stop, tells_apart, time_gradient, unknown_derivative
from keras_node.gradients.record import LastSteps
from keras_node.integrate import VectorFieldWithSpeed, integrate
from keras_node.interpolation import Progress
from keras_node.solution import Stats
from keras_node.solve import Problem, PureField, Trajectory, adjoint_clock, solve
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates, Step
from keras_node.step_size import rms_norm
from keras_node.trees import Nest
from keras_node.vjp import vjp


@keras.saving.register_keras_serializable(package="keras_node")
class BacksolveAdjoint:
    """Computes the gradient by a solve backward in time, in memory that does not grow with the number of steps.

    The adjoint is `a = dL/dy`, where `L` is the loss. The augmented state `(y, a, g)` is integrated from the last time
    to the first:

    `dy/dt = f(t, y, p)`, `da/dt = -a df/dy`, `dg/dt = -a df/dp`

    At every time of `ts`, the gradient of the loss with respect to the state at this time is added to `a`, and `y`
    starts again from the forward solution. At the end, `g` is the gradient with respect to the parameters `p`.

    This is an approximation of the gradient of the exact solution. Its error decreases with the tolerances, and it
    differs from the gradient of the discrete solution by about the error of the solution. A field that contracts
    strongly forward in time is unstable backward, and then `y` leaves the path of the forward solution: set
    `num_checkpoints`, or use another gradient. Second derivatives are computed through the steps of the backward solve.

    Args:
        solver: the solver of the backward solve, a `RungeKutta` or the name of a method. Defaults to `None`, for the
            solver of the forward solve, which then begins with the step size that the forward solve reached.
        norm: `"state"` (default) controls the error of `(y, a)` only. `"full"` also controls the error of `g`, and
            takes more steps. Per-sample steps, and times that differ between samples, need `"state"`.
        num_checkpoints: number of states of the forward solution, evenly spaced in time, from which `y` starts again in
            the backward solve, as it does at the times of `ts`. This limits how far `y` can drift. It costs about one
            more step for each state, and the memory of these states. Defaults to `None`, for none.

    Raises:
        ValueError: for an option out of range. When the solve begins, for `norm="full"` with per-sample steps or times,
            and for `num_checkpoints` with a forward solver that has `num_steps`.

    Example:
        >>> gradient = keras_node.BacksolveAdjoint(solver=keras_node.RungeKutta("tsit5", rtol=1e-5))
        >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=gradient)
        >>> layer(keras.ops.ones((3, 2))).shape
        TensorShape([3, 2])

    Reference:

        - Chen, Rubanova, Bettencourt & Duvenaud (2018), "Neural Ordinary Differential Equations", arXiv:1806.07366,
          appendices B and C.
        - Kidger, Chen & Lyons (2021), "Hey, that's not an ODE: Faster ODE Adjoints via Seminorms", arXiv:2009.09457,
          for `norm="state"`.
    """

    def __init__(
        self, solver: RungeKutta | str | None = None, norm: str = "state", num_checkpoints: int | None = None
    ) -> None:
        if norm not in ("state", "full"):
            raise ValueError(f'`norm` must be "state" or "full". Received: norm={norm!r}')
        self.solver: RungeKutta | None = None if solver is None else solvers.get(solver)
        self.norm = norm
        if num_checkpoints is not None:
            num_checkpoints = positive_integer("num_checkpoints", num_checkpoints)
        self.num_checkpoints = num_checkpoints
        self._known_result: Nest = None

    def with_known_result(self, y1: Nest) -> "BacksolveAdjoint":
        """Returns the same gradient for a solve between two times whose result `y1` is already known.

        A call of it does not solve forward again. With `num_checkpoints` it does, because it needs states in between.

        Args:
            y1: the state at the second time.
        """
        if self.num_checkpoints is not None:
            return self
        gradient = copy.copy(self)
        gradient._known_result = y1
        return gradient

    def __call__(self, problem: Problem) -> Trajectory:
        """Solves the problem with this gradient. The layers and `keras_node.odeint` call it."""
        solver = self.solver or problem.solver
        if self.norm == "full" and (solver.per_sample or problem.ts.shape.rank == 2):
            raise ValueError(
                '`norm="full"` needs times and steps that all samples share, because they share the '
                'gradient of the parameters. Use `norm="state"`, or shared times without `per_sample=True`. '
                f'Received: norm="full", ts of shape {tuple(problem.ts.shape)}, solver={solver!r}'
            )

        if self._known_result is not None:
            return solve_with_gradient(problem, self._from_known_result, self._backward)
        if self.num_checkpoints is None:
            return solve_with_gradient(problem, self._forward, self._backward)
        if problem.solver.num_steps is not None:
            raise ValueError(
                "`num_checkpoints` needs adaptive steps or a `step_size`, because `num_steps` counts the steps between "
                "two times of `ts`. Leave out `num_checkpoints`, and pass more times in `ts` if `y` drifts. "
                f"Received: num_checkpoints={self.num_checkpoints}, solver={problem.solver!r}"
            )
        # At every time of `ts`, `y` starts again from the solution. So checkpoints are more times of `ts`.
        parts = np.arange(1, self.num_checkpoints + 1) / (self.num_checkpoints + 1)

        def with_checkpoints(ts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            first, last = tf.stop_gradient(ts[0]), tf.stop_gradient(ts[-1])
            return merge(ts, tf.stack([first + part * (last - first) for part in parts]))

        ts, place = with_checkpoints(problem.ts)
        numbers = problem.numbers
        if numbers is not None:
            with tf.init_scope():
                numbers = with_checkpoints(tf.constant(numbers))[0].numpy()
        extended = problem._replace(ts=ts, numbers=numbers)
        trajectory = solve_with_gradient(extended, self._forward, self._backward)
        return trajectory._replace(ys=tf.nest.map_structure(lambda y: reorder(y, place), trajectory.ys))

    def _forward(self, problem: Problem) -> tuple[Trajectory, tuple]:
        """Solves forward, and keeps the step size with which the backward solve can begin."""
        solver = problem.forward_solver
        if self.solver is not None or not solver.adaptive or solver.first_step is not None:
            return solve(problem)
        batch = tf.shape(tf.nest.flatten(problem.y0)[0])[:1] if solver.per_sample else []
        trajectory, ((last, before),) = solve(problem, [LastSteps(tf.zeros(batch, problem.dtype))])
        # The end may have cut the last step short.
        reached = tf.maximum(last, before)
        if solver.per_sample and not problem.solver.per_sample:
            reached = tf.reduce_max(reached)  # the backward solve has joint steps
        return trajectory, (reached,)

    def _from_known_result(self, problem: Problem) -> tuple[Trajectory, tuple]:
        """The trajectory of a known result."""
        ys = tf.nest.map_structure(lambda a, b: tf.stack([a, tf.cast(b, a.dtype)]), problem.y0, self._known_result)
        return Trajectory(ys, Stats.zeros(), tf.constant(0)), ()

    def _backward(self, problem: Problem, memory: tuple, ys: Nest, dys: Nest) -> tuple[Gradients, Stats, tf.Tensor]:
        """The gradients of `y0`, `ts` and `params`, and the stats and status of their solve."""
        first_step = memory[0] if memory else None
        vector_field, params = problem.vector_field, problem.params
        solver = self.solver or problem.solver
        kinks = sorted({*problem.solver.step_at, *solver.step_at})
        clock, stops = adjoint_clock(problem, solver, kinks)
        one_each = not kinks and tells_apart(problem)
        state_at, arriving = loss_by_stop(None if one_each else stops, clock, ys, dys)

        def jump(i: tf.Tensor, state: Nest) -> Nest:
            y, adjoint = state
            return state_at(i, y), trees.add(adjoint, arriving(i))

        state = (tf.nest.map_structure(lambda y: y[-1], ys), arriving(tf.zeros_like(clock.count)))
        gradients = _in_precision_of(problem.y0, tf.nest.map_structure(tf.zeros_like, params))
        augmented = _augmented(vector_field, params)
        if solver.per_sample:
            observer = ParameterGradient(vector_field, params, clock, solver.tableau)
            integral = integrate(
                lambda *at: Rates(augmented(*at).y),
                state,
                clock,
                solver,
                observers=[observer],
                jump=jump,
                first_step=first_step,
            )
            (_, adjoint), (gradients,) = integral.y1, integral.memories
            gradients = trees.poison(tf.reduce_any(integral.status != 0), gradients)
        elif self.norm == "full" and params:

            def rates(t: tf.Tensor, state: Nest, speed: tf.Tensor) -> Rates:
                dstate, dgradients = augmented(t, state[:2], speed)
                return Rates((*dstate, dgradients))

            def full_jump(i: tf.Tensor, state: Nest) -> Nest:
                return (*jump(i, state[:2]), state[2])

            def norm(error: Nest) -> tf.Tensor:
                # One mean over both would allow the state any error if there are many weights.
                return tf.maximum(rms_norm(error[:2], False), rms_norm(error[2], False))

            integral = integrate(
                rates, (*state, gradients), clock, solver, jump=full_jump, norm=norm, first_step=first_step
            )
            _, adjoint, gradients = integral.y1
        else:
            integral = integrate(
                augmented, state, clock, solver, quadrature=gradients, jump=jump, first_step=first_step
            )
            (_, adjoint), gradients = integral.y1, integral.quadrature

        if not one_each:
            # Add the gradients of times that equal the first. If all of them do, the adjoint contains these already.
            adjoint = trees.where(clock.count > 0, trees.add(adjoint, arriving(clock.count)), adjoint)
        dts = tf.zeros_like(problem.ts)
        if problem.times_vary:
            dts = tf.cast(time_gradient(problem, ys, dys, adjoint), dts.dtype)
            inner = (stops > 0) & (stops < clock.count) if problem.is_phase else tf.ones_like(stops, tf.bool)
            unknown = functools.partial(unknown_derivative, problem.ts, stops, inner)
            adjoint = tf.nest.map_structure(lambda a: a + unknown(a), adjoint)
        adjoint = trees.add(adjoint, tf.nest.map_structure(lambda d: d[0], dys))
        gradients = [tf.cast(g, p.dtype) for g, p in zip(gradients, params, strict=True)]
        return (adjoint, dts, gradients), integral.stats, integral.status

    def get_config(self) -> dict[str, Any]:
        solver = keras.saving.serialize_keras_object(self.solver) if self.solver else None
        return {"solver": solver, "norm": self.norm, "num_checkpoints": self.num_checkpoints}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BacksolveAdjoint":
        return cls(**config)


def _augmented(vector_field: PureField, params: list[tf.Tensor]) -> VectorFieldWithSpeed:
    """The rates of `(y, adjoint)`, and of the gradient of the parameters as a quadrature."""
    sources = vector_field.sources(params)

    def augmented(t: tf.Tensor, state: Nest, speed: tf.Tensor) -> Rates:
        y, adjoint = state
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(y) + sources)
            dy = vector_field(t, y, params)
        if speed.shape.rank == 0:
            dadjoint, dgradients = vjp(tape, dy, (y, sources), trees.scale(-1.0, adjoint))
            return Rates((dy, dadjoint), _in_precision_of(adjoint, dgradients))
        # The product sums over samples, and each must count at its own speed. A sample at rest must not count, but a
        # second derivative with respect to its times needs the rate of its adjoint: a negligible speed gives both.
        speed = speed + tf.where(speed == 0, tf.cast(1e-20, speed.dtype), 0)
        dadjoint, dgradients = vjp(tape, dy, (y, sources), trees.scale(-speed, adjoint))
        return Rates((dy, trees.scale(1 / speed, dadjoint)), _in_precision_of(adjoint, dgradients))

    return augmented


def _in_precision_of(state: Nest, gradients: Nest) -> Nest:
    """The gradients of parameters in the precision of the state, in which they are summed."""
    dtype = tf.nest.flatten(state)[0].dtype
    return trees.each(lambda g: g if g.dtype == dtype else tf.cast(g, dtype), gradients)


class ParameterGradient:
    """An observer that sums the gradient of the parameters in a backward solve with per-sample steps.

    Samples have their own steps but share the parameters. So the vector-Jacobian products contain the weights of the
    quadrature, and one product per attempted step gives the sum over all stages and samples.
    """

    def __init__(self, vector_field: PureField, params: list[tf.Tensor], clock: Clock, tableau: ButcherTableau) -> None:
        self.vector_field = vector_field
        self.params = params
        self.clock = clock
        self.tableau = tableau

    def start(self, y0: Nest) -> Nest:
        return _in_precision_of(y0, tf.nest.map_structure(tf.zeros_like, self.params))

    def update(self, memory: Nest, step: Step, progress: Progress) -> Nest:
        # A rejected step may have left the domain of the field, so its stages are replaced before they are evaluated.
        sources = self.vector_field.sources(self.params)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            rates, weights = [], []
            for weight, (t, state) in zip(self.tableau.b, step.stages, strict=True):
                if weight != 0:
                    y, adjoint = trees.where(progress.accepted, state, step.y0)
                    rates.append(self.vector_field(self.clock.inside(progress.segment, t), y, self.params))
                    dt = tf.where(progress.accepted, step.dt, 0)
                    weights.append(trees.scale(-weight * dt, adjoint))
        return trees.add(memory, _in_precision_of(step.y0, vjp(tape, rates, sources, weights)))
