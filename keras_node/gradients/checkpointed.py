"""The gradient of the discrete solution at bounded memory: replay every accepted step, and differentiate it."""

import math

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.arguments import positive_integer
from keras_node.gradients.custom_vjp import differentiated_as, solve_with_gradient
from keras_node.gradients.replay import Record, Recorder, Replay
from keras_node.gradients.vjp import vjp
from keras_node.integrate import step_limit
from keras_node.solution import Stats, Status
from keras_node.solve import Problem, Trajectory, leave_start, solve, solve_clock
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class CheckpointedAdjoint:
    """Differentiates every accepted step, from the last to the first, replayed from checkpoints.

    With the steps `y[n+1] = step(y[n], p)` of the forward solve and `a[n] = dL/dy[n]`,

    `a[n] = a[n+1] dstep/dy`, `dL/dp = sum of a[n+1] dstep/dp`.

    The gradient is that of the discrete solution, exact to rounding: what backpropagation through the accepted steps
    gives. The lengths of the steps are constants of it. Rejected steps cost nothing backwards.

    The forward solve keeps the length of every step, and of the states as many as `num_checkpoints`: all of them
    while they fit, then every second, every fourth and so on. Backwards, the states in between are computed again, one
    stretch after the other. Memory for `n` steps is that of `O(sqrt(n))` states; under XLA, where it must be known
    beforehand, `n` is the solver's `max_steps`.

    A first derivative has these costs; a second derivative replays all steps at once, in memory that grows with `n`.

    Args:
        num_checkpoints: how many states to keep at most. `None` is the square root of the greatest number of steps
            that the solver may take, 64 for its default `max_steps=4096`.

    Example:
    >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=keras_node.CheckpointedAdjoint())
    >>> layer(keras.ops.ones((3, 2))).shape
    TensorShape([3, 2])

    Reference:

    - Griewank & Walther (2008), "Evaluating Derivatives", 12.
    - Zhuang et al. (2020), "Adaptive Checkpoint Adjoint Method for Gradient Estimation in Neural ODE".
    """

    def __init__(self, num_checkpoints: int | None = None):
        if num_checkpoints is not None:
            num_checkpoints = positive_integer("num_checkpoints", num_checkpoints)
        self.num_checkpoints = num_checkpoints

    def __call__(self, problem: Problem) -> Trajectory:
        clock, _ = solve_clock(problem._replace(ts=tf.stop_gradient(problem.ts)))
        max_steps = step_limit(problem.solver, clock)
        slots = self.num_checkpoints or _square_root(max_steps)
        recorder = Recorder(clock, max_steps, slots)
        # Strides are powers of two.
        capacity = 2 ** math.ceil(math.log2(max(1, max_steps / slots))) if isinstance(max_steps, int) else max_steps

        def forward(problem):
            trajectory, (memory,) = solve(problem, [recorder])
            return trajectory, (recorder.result(memory), trajectory.status)

        def backward(problem, memory, ys, dys):
            del ys
            return _backward(problem, *memory, capacity, dys)

        return leave_start(problem, solve_with_gradient(problem, forward, backward))

    def get_config(self) -> dict:
        return {"num_checkpoints": self.num_checkpoints}

    @classmethod
    def from_config(cls, config: dict) -> "CheckpointedAdjoint":
        return cls(**config)


def _backward(problem: Problem, record: Record, status: tf.Tensor, capacity, dys: Nest):
    """The gradients of `y0`, `ts` and `params`, differentiable once more through a replay of all steps."""

    def replay(y0, ts, params):
        return Replay(problem._replace(y0=y0, ts=ts, params=params), record, capacity)

    def step_by_step(*arguments):
        *solved, dys = arguments
        return replay(*solved).gradient(dys)

    def at_once(*arguments):
        *solved, dys = arguments
        sources = (*solved[:2], problem.vector_field.sources(solved[2]))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(sources))
            ys = replay(*solved).states(*solved)
        return vjp(tape, ys, sources, dys)

    arguments = (problem.y0, problem.ts, problem.params, dys)
    adjoint, dts, dparams = differentiated_as(
        step_by_step, at_once, arguments, problem.vector_field.pure, jit_compile=False
    )
    failed = status != int(Status.SUCCESS)
    any_failed = tf.reduce_any(failed)
    gradients = trees.poison(failed, adjoint), trees.poison(any_failed, dts), trees.poison(any_failed, dparams)
    # Whoever took the states of a failed solve has been told; nothing is solved here.
    return gradients, _replay_stats(problem, record), tf.constant(int(Status.SUCCESS))


def _replay_stats(problem: Problem, record: Record) -> Stats:
    """Every step once for its gradient, and once more for its state unless that was kept."""
    tableau = problem.solver.tableau
    kept = (record.count + record.stride - 1) // record.stride
    stages = tableau.num_stages - 1 if tableau.fsal and problem.ts.shape[0] == 2 else tableau.num_stages
    # The state after the last step of a stretch is not needed.
    return Stats(stages * (2 * record.count - kept), record.count, tf.constant(0))


def _square_root(count: int | tf.Tensor) -> int | tf.Tensor:
    if isinstance(count, int):
        return math.isqrt(count - 1) + 1
    return tf.cast(tf.math.ceil(tf.sqrt(tf.cast(count, tf.float32))), tf.int32)
