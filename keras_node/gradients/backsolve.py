"""The adjoint method: the gradient as a second ODE, solved backwards in time."""

import copy

import keras
import numpy as np
import tensorflow as tf

from keras_node import solvers, trees
from keras_node.arguments import positive_integer
from keras_node.clock import merge, pick, reorder
from keras_node.gradients.custom_vjp import solve_with_gradient
from keras_node.gradients.vjp import vjp
from keras_node.integrate import integrate
from keras_node.solution import Stats
from keras_node.solve import Problem, Trajectory, adjoint_clock, solve
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

        def with_checkpoints(ts):
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
        """Solves, and keeps the length of step with which the way back can begin."""
        solver = problem.solver
        if self.solver is not None or not solver.adaptive or solver.first_step is not None:
            return solve(problem)
        batch = tf.shape(tf.nest.flatten(problem.y0)[0])[:1] if solver.per_sample else []
        trajectory, ((last, before),) = solve(problem, [LastSteps(tf.zeros(batch, problem.dtype))])
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
        vector_field, params = problem.vector_field, problem.params
        solver = self.solver or problem.solver
        kinks = sorted({*problem.solver.step_at, *solver.step_at})
        clock, stops = adjoint_clock(problem, solver, kinks)
        one_each = not kinks and _tells_apart(problem)
        state_at, arriving = _loss_by_stop(None if one_each else stops, clock, ys, dys)

        def jump(i, state):
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

            def rates(t, state, speed):
                dstate, dgradients = augmented(t, state[:2], speed)
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

        if not one_each:
            # Those of times that equal the first; where all do, they are there already.
            adjoint = trees.where(clock.count > 0, trees.add(adjoint, arriving(clock.count)), adjoint)
        dts = tf.zeros_like(problem.ts)
        if problem.numbers is None:
            dts = tf.cast(_time_gradient(problem, ys, dys, adjoint), dts.dtype)
            adjoint = tf.nest.map_structure(lambda a: a + _unknown_derivative(problem.ts, stops, a), adjoint)
        adjoint = trees.add(adjoint, tf.nest.map_structure(lambda d: d[0], dys))
        gradients = [tf.cast(g, p.dtype) for g, p in zip(gradients, params, strict=True)]
        return (adjoint, dts, gradients), integral.stats, integral.status

    def get_config(self) -> dict:
        solver = keras.saving.serialize_keras_object(self.solver) if self.solver else None
        return {"solver": solver, "norm": self.norm, "num_checkpoints": self.num_checkpoints}

    @classmethod
    def from_config(cls, config: dict) -> "BacksolveAdjoint":
        return cls(**config)


def _loss_by_stop(stops, clock, ys, dys):
    """What a backward solve meets at the stops of its clock.

    Args:
        stops: the stop at every time, from the last to the first, or `None` where each has one of its own.
        clock: the clock.
        ys: the states at `ts`.
        dys: the gradients of a loss with respect to them.

    Returns:
        `state_at(i, y)`, the forward solution at the `i`-th stop, or `y` where there is no time of `ts`; and
        `arriving(i)`, the sum of the gradients there, but for the one at the first time. `i` is one index, or one for
        each sample.
    """
    last = tf.shape(tf.nest.flatten(ys)[0])[0] - 1
    if stops is None:
        return (
            lambda i, y: tf.nest.map_structure(lambda a: pick(a, last - i), ys),
            lambda i: tf.nest.map_structure(lambda d: pick(d, last - i), dys),
        )
    size = tf.shape(clock.stops)[0]
    number = tf.reshape(tf.range(last + 1), [-1] + [1] * (stops.shape.rank - 1)) + tf.zeros_like(stops)
    which = last - tf.maximum(_sum_by_stop(tf.math.unsorted_segment_max, number, stops, size), -1)
    later = tf.nest.map_structure(lambda d: tf.concat([d[:0:-1], tf.zeros_like(d[:1])], axis=0), dys)
    sums = tf.nest.map_structure(lambda d: _sum_by_stop(tf.math.unsorted_segment_sum, d, stops, size), later)

    def state_at(i, y):
        index = pick(which, i)
        known = tf.nest.map_structure(lambda a: pick(a, tf.minimum(index, last)), ys)
        return trees.where(index <= last, known, y)

    return state_at, lambda i: tf.nest.map_structure(lambda d: pick(d, i), sums)


def _tells_apart(problem):
    """Whether no two of several times coincide, so far as that is known before the solve; two ends need no care."""
    if problem.numbers is None or problem.ts.shape[0] == 2:
        return problem.ts.shape[0] == 2
    elapsed = (problem.numbers - problem.numbers[0]).astype(problem.dtype.as_numpy_dtype)
    return bool(np.all(np.diff(elapsed, axis=0) != 0))


def _sum_by_stop(segment_sum, x, stops, size):
    """The sums, or the like, of `x` over the times at every stop, in order; samples may have stops of their own."""
    if stops.shape.rank == 1:
        return segment_sum(x, stops, size)
    batch = tf.shape(stops)[1]
    sums = segment_sum(x, stops * batch + tf.range(batch), size * batch)
    return tf.reshape(sums, tf.concat([[size, batch], tf.shape(x)[2:]], axis=0))


def _augmented(vector_field, params):
    """The rates of `(y, adjoint)` and, as a quadrature, of the parameters' gradient."""
    sources = vector_field.sources(params)

    def augmented(t, state, speed):
        y, adjoint = state
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(y) + sources)
            dy = vector_field(t, y, params)
        if speed.shape.rank == 0:
            dadjoint, dgradients = vjp(tape, dy, (y, sources), trees.scale(-1.0, adjoint))
            return Rates((dy, dadjoint), _in_precision_of(adjoint, dgradients))
        # The product sums over samples, each of which must count at its own speed. A sample at rest must not count,
        # yet a second derivative with respect to its times needs its adjoint's rate: a negligible speed gives both.
        speed = speed + tf.where(speed == 0, tf.cast(1e-20, speed.dtype), 0)
        dadjoint, dgradients = vjp(tape, dy, (y, sources), trees.scale(-speed, adjoint))
        return Rates((dy, trees.scale(1 / speed, dadjoint)), _in_precision_of(adjoint, dgradients))

    return augmented


@tf.custom_gradient
def _unknown_derivative(ts, stops, like):
    """Zeros, with the derivative NaN with respect to times that coincide, between which no step is taken.

    A second derivative would miss there what moving one of the times does to the adjoint.
    """

    def gradient(upstream):
        del upstream
        coincide = stops[:0:-1] == stops[-2::-1]
        if stops.shape.rank > ts.shape.rank:
            coincide = tf.reduce_any(coincide, axis=1)
        elif stops.shape.rank < ts.shape.rank:
            coincide = coincide[:, None]
        none = tf.zeros_like(coincide[:1])
        unknown = tf.concat([none, coincide], axis=0) | tf.concat([coincide, none], axis=0)
        return tf.where(unknown, tf.constant(float("nan"), ts.dtype), tf.zeros_like(ts)), None, tf.zeros_like(like)

    return tf.zeros_like(like), gradient


def _in_precision_of(state, gradients):
    """Gradients of parameters in the precision of the state, in which they are summed up."""
    dtype = tf.nest.flatten(state)[0].dtype
    return trees.each(lambda g: g if g.dtype == dtype else tf.cast(g, dtype), gradients)


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
        return _in_precision_of(state, tf.nest.map_structure(tf.zeros_like, self.params))

    def update(self, gradients, step, progress):
        # A rejected step may have left the field's domain: its stages are replaced before they are evaluated.
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
        return trees.add(gradients, _in_precision_of(step.y0, vjp(tape, rates, sources, weights)))


def _time_gradient(problem, ys, dys, adjoint):
    """`dL/dts`: a later time moves its state along the field, the first time moves the whole path."""
    times = problem.times

    def along_field(t, y, dy):
        rate = problem.vector_field(t, y, problem.params)
        products = tf.nest.map_structure(tf.multiply, dy, rate)
        axes = 1 if times.shape.rank == 2 else 0
        return tf.add_n([tf.reduce_sum(p, list(range(axes, p.shape.rank))) for p in tf.nest.flatten(products)])

    def at(i, states):
        return tf.nest.map_structure(lambda x: pick(x, i), states)

    later = tf.map_fn(
        lambda i: along_field(pick(times, i), at(i, ys), at(i, dys)),
        tf.range(1, tf.shape(times)[0]),
        fn_output_signature=tf.TensorSpec(times.shape[1:], times.dtype),
    )
    return tf.concat([-along_field(times[0], at(0, ys), adjoint)[None], later], axis=0)
