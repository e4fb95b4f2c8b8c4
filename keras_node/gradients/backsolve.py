"""The adjoint method: the gradient as a second ODE, solved backwards in time."""

import copy

import keras
import numpy as np
import tensorflow as tf

from keras_node import solvers, trees
from keras_node.arguments import positive_integer
from keras_node.clock import make_clock, merge, pick, take
from keras_node.gradients.custom import solve_with_gradient
from keras_node.gradients.vjp import vjp
from keras_node.integrate import integrate
from keras_node.solution import Stats
from keras_node.solve import Problem, Trajectory, per_sample_times, solve
from keras_node.solvers.step import Rates
from keras_node.step_size import rms_norm
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class BacksolveAdjoint:
    """Solves for the gradient backwards in time, in memory that does not grow with the number of steps.

    With the adjoint `a = dL/dy`, the augmented state `(y, a, g)` is integrated from the last time to the first,

    `dy/dt = f(t, y, p)`, `da/dt = -a df/dy`, `dg/dt = -a df/dp`,

    and at every time of `ts` the loss's own gradient is added to `a` and `y` starts again from the forward
    solution. `g` ends as the gradient of the parameters.

    This is the gradient of the exact solution, solved approximately: its error falls with the tolerances, and it
    differs from the gradient of the discrete solution by about as much as the solution itself is off. A field
    that is strongly contracting forwards in time is unstable backwards, and `y` then drifts from the path it came:
    give `num_checkpoints`, or use another gradient. Second derivatives go through the steps of the backward solve.

    Args:
        solver: the solver of the backward solve; `None` is the one of the forward solve, which then goes on with the
            length of step that it has come to.
        norm: `"state"` controls the error of `(y, a)` only, `"full"` that of the parameters' gradient as well, at
            the cost of more steps. Per-sample steps need `"state"`.
        num_checkpoints: number of states of the forward solution, evenly spaced in time, from which `y` starts again
            on its way back, as it does at every time of `ts`. The adjoint is then a solve over shorter intervals, in
            which less drift builds up, at the cost of about one more step for each and of keeping these states.

    Example:
    >>> gradient = keras_node.BacksolveAdjoint(solver=keras_node.RungeKutta("tsit5", rtol=1e-5))
    >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=gradient)

    Reference:

    - Chen et al. (2018), "Neural Ordinary Differential Equations", appendix B and C.
    - Kidger, Chen & Lyons (2021), "Hey, that's not an ODE": the norm over the state only.
    """

    def __init__(self, solver=None, norm: str = "state", num_checkpoints: int | None = None):
        if norm not in ("state", "full"):
            raise ValueError(f'`norm` must be "state" or "full". Received: norm={norm!r}')
        self.solver = None if solver is None else solvers.get(solver)
        self.norm = norm
        if num_checkpoints is not None:
            num_checkpoints = positive_integer("num_checkpoints", num_checkpoints)
        self.num_checkpoints = num_checkpoints
        self._known = None

    def given(self, y1: Nest) -> "BacksolveAdjoint":
        """The same gradient, of a solve between two times whose result `y1` is known and not solved for again."""
        if self.num_checkpoints is not None:
            return self  # it needs states in between
        gradient = copy.copy(self)
        gradient._known = y1
        return gradient

    def __call__(self, problem: Problem) -> Trajectory:
        solver = self.solver or problem.solver
        if self.norm == "full" and (solver.per_sample or problem.ts.shape.rank == 2):
            raise ValueError(
                "The gradient of the parameters is shared by the samples: it has no error where every sample has a "
                'time of its own. Use norm="state", or times and steps that the samples share. '
                f'Received: norm="full", ts of shape {tuple(problem.ts.shape)}, solver={solver!r}'
            )

        if self._known is not None:
            return solve_with_gradient(problem, self._recall, self._backward)
        if self.num_checkpoints is None:
            return solve_with_gradient(problem, self._forward, self._backward)
        if problem.solver.num_steps is not None:
            raise ValueError(
                "`num_checkpoints` needs adaptive steps or a `step_size`: with `num_steps`, steps are counted between "
                "two times of `ts`, of which you may ask for more. "
                f"Received: num_checkpoints={self.num_checkpoints}, solver={problem.solver!r}"
            )
        # A state of the solution to start again from is what a time of `ts` has.
        parts = np.arange(1, self.num_checkpoints + 1) / (self.num_checkpoints + 1)
        first, last = tf.stop_gradient(problem.ts[0]), tf.stop_gradient(problem.ts[-1])
        ts, index = merge(problem.ts, tf.stack([first + part * (last - first) for part in parts]))
        trajectory = solve_with_gradient(problem._replace(ts=ts), self._forward, self._backward)
        wanted = tf.argsort(tf.where(index < 0, tf.size(index), index), axis=0, stable=True)[: tf.shape(problem.ts)[0]]
        return trajectory._replace(ys=tf.nest.map_structure(lambda y: take(y, wanted), trajectory.ys))

    def _forward(self, problem: Problem) -> tuple[Trajectory, tuple]:
        """Solves, and keeps the length of step with which the way back can begin."""
        solver = problem.solver
        if self.solver is not None or not solver.adaptive or solver.first_step is not None:
            return solve(problem)
        ts = per_sample_times(problem.ts, solver, problem.y0)
        observer = LastSteps(ts[0] if solver.per_sample else tf.zeros((), ts.dtype))
        trajectory, ((last, before),) = solve(problem, [observer])
        # The last step is cut short at the end.
        return trajectory, (tf.maximum(last, before),)

    def _recall(self, problem: Problem) -> tuple[Trajectory, tuple]:
        """The known result, as if solved for."""
        ys = tf.nest.map_structure(lambda a, b: tf.stack([a, tf.cast(b, a.dtype)]), problem.y0, self._known)
        none = tf.constant(0)
        return Trajectory(ys, Stats(none, none, none), none), ()

    def _backward(self, problem: Problem, memory: tuple, ys: Nest, dys: Nest) -> tuple[tuple, Stats, tf.Tensor]:
        """The gradients of `y0`, `ts` and `params`, from those of the states at `ts`, and how their solve went."""
        first_step = memory[0] if memory else None
        vector_field, y0, ts, params, forward_solver = problem[:5]
        solver = self.solver or forward_solver
        times, stops_at = per_sample_times(ts, solver, y0)[::-1], None
        kinks = sorted({*forward_solver.step_at, *solver.step_at})
        if kinks:
            times, stops_at = merge(times, tf.constant(kinks, times.dtype))
        clock = make_clock(times, solver.per_sample, kinks=bool(kinks))

        last = (ts.shape[0] or tf.shape(ts)[0]) - 1

        def at(i, states):
            """The states at `ts[-1 - i]`; `i` is one index, or one for each sample."""
            return tf.nest.map_structure(lambda x: pick(x, last - i), states)

        def jump(i, state):
            i = i if stops_at is None else pick(stops_at, i)
            _, adjoint = state
            index = tf.maximum(i, 0)
            behind = (at(index, ys), trees.add(adjoint, at(index, dys)))
            # At a kink alone the state goes on as it is, and the field is evaluated afresh.
            return behind if stops_at is None else trees.where(i >= 0, behind, state)

        state = (at(0, ys), at(0, dys))
        gradients = tf.nest.map_structure(tf.zeros_like, params)
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

            def rates(t, state, rate):
                dstate, dgradients = augmented(t, state[:2], rate)
                return Rates((*dstate, dgradients))

            def full_jump(i, state):
                return (*jump(i, state[:2]), state[2])

            def norm(error):
                # Not one mean over both: where weights are many, it would allow the state any error.
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

        dts = tf.zeros_like(ts)
        if problem.times_vary:
            dts = _time_gradient(vector_field, params, ts, ys, dys, adjoint)
            if clock.num_segments == 1:
                at_rest = clock.end == 0
                adjoint = tf.nest.map_structure(lambda a: a + _unknown_derivative(ts, at_rest, a), adjoint)
        adjoint = trees.add(adjoint, tf.nest.map_structure(lambda d: d[0], dys))
        return (adjoint, dts, gradients), integral.stats, integral.status

    def get_config(self) -> dict:
        solver = keras.saving.serialize_keras_object(self.solver) if self.solver else None
        return {"solver": solver, "norm": self.norm, "num_checkpoints": self.num_checkpoints}

    @classmethod
    def from_config(cls, config: dict) -> "BacksolveAdjoint":
        return cls(**config)


def _augmented(vector_field, params):
    """The rates of `(y, adjoint)` and, as a quadrature, of the parameters' gradient."""

    def augmented(t, state, rate):
        y, adjoint = state
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(y) + params)
            dy = vector_field(t, y, params)
        if rate.shape.rank == 0:
            dadjoint, dgradients = vjp(tape, dy, (y, params), trees.scale(-1.0, adjoint))
            return Rates((dy, dadjoint), dgradients)
        # The product sums over samples, each of which must count at its own rate. One at rest has no say, but for a
        # share below rounding: its adjoint has a rate, which a second derivative with respect to its times asks for.
        rate = rate + tf.where(rate == 0, tf.cast(1e-20, rate.dtype), 0)
        dadjoint, dgradients = vjp(tape, dy, (y, params), trees.scale(-rate, adjoint))
        return Rates((dy, trees.scale(1 / rate, dadjoint)), dgradients)

    return augmented


@tf.custom_gradient
def _unknown_derivative(ts, at_rest, like):
    """Zeros, with the derivative NaN with respect to times between which no step is taken.

    A second derivative would miss there what moving one of the times does to the adjoint.
    """

    def gradient(upstream):
        del upstream
        unknown = at_rest if ts.shape.rank == 2 else tf.reduce_any(at_rest)
        return tf.where(unknown, tf.constant(float("nan"), ts.dtype), tf.zeros_like(ts)), None, tf.zeros_like(like)

    return tf.zeros_like(like), gradient


class LastSteps:
    """The lengths of the last accepted step and of the one before, an observer.

    Args:
        like: a time, or with per-sample steps one of each sample; the lengths are zero before there is a step.
    """

    def __init__(self, like):
        self.like = like

    def start(self, y0):
        del y0
        return (tf.zeros_like(self.like),) * 2

    def update(self, lengths, step, progress):
        del step
        return trees.where(progress.accepted, (progress.length, lengths[0]), lengths)


class ParameterGradient:
    """The parameters' gradient of a backward solve with per-sample steps, an observer of its steps.

    Every sample then has a step of its own and the parameters are shared, so the weights of the quadrature go into
    the vector-Jacobian products: one sum over stages and samples for every attempted step.
    """

    def __init__(self, vector_field, params, clock, tableau):
        self.vector_field = vector_field
        self.params = params
        self.clock = clock
        self.tableau = tableau

    def start(self, state):
        del state
        return tf.nest.map_structure(tf.zeros_like, self.params)

    def update(self, gradients, step, progress):
        # A rejected step may have left the field's domain: its stages are replaced before they are evaluated.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.params)
            rates, weights = [], []
            for weight, (t, state) in zip(self.tableau.b, step.stages, strict=True):
                if weight != 0:
                    y, adjoint = trees.where(progress.accepted, state, step.y0)
                    rates.append(self.vector_field(self.clock.inside(progress.segment, t), y, self.params))
                    dt = tf.where(progress.accepted, step.dt, 0)
                    weights.append(trees.scale(-weight * dt, adjoint))
        return trees.add(gradients, vjp(tape, rates, self.params, weights))


def _time_gradient(vector_field, params, ts, ys, dys, adjoint):
    """`dL/dts`: a later time moves its state along the field, the first time moves the whole path."""

    def along_field(t, y, dy):
        rate = vector_field(t, y, params)
        products = tf.nest.map_structure(tf.multiply, dy, rate)
        axes = 1 if ts.shape.rank == 2 else 0
        return tf.add_n([tf.reduce_sum(p, list(range(axes, p.shape.rank))) for p in tf.nest.flatten(products)])

    def at(i, states):
        return tf.nest.map_structure(lambda x: pick(x, i), states)

    later = tf.map_fn(
        lambda i: along_field(pick(ts, i), at(i, ys), at(i, dys)),
        tf.range(1, tf.shape(ts)[0]),
        fn_output_signature=tf.TensorSpec(ts.shape[1:], ts.dtype),
    )
    return tf.concat([-along_field(ts[0], at(0, ys), adjoint)[None], later], axis=0)
