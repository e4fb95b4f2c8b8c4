"""The gradient of the discrete solution in limited memory: every accepted step is replayed and differentiated."""

import math
from typing import Any

import keras
import tensorflow as tf

from keras_node.arguments import positive_integer
from keras_node.gradients.custom_vjp import Gradients, differentiated_as, poisoned, solve_with_gradient
from keras_node.gradients.record import Record, Recorder
from keras_node.gradients.replay import Replay
from keras_node.loop_start import step_limit
from keras_node.solution import Stats, Status
from keras_node.solve import Problem, Trajectory, add_gradient_at_start, solve, solve_clock
from keras_node.trees import Nest
from keras_node.vjp import vjp


@keras.saving.register_keras_serializable(package="keras_node")
class CheckpointedAdjoint:
    """Computes the gradient by differentiating every accepted step, from the last to the first.

    The steps of the forward solve are `y[n+1] = step(y[n], p)`. With `a[n] = dL/dy[n]`, where `L` is the loss,

    `a[n] = a[n+1] dstep/dy`, `dL/dp = sum of a[n+1] dstep/dp`

    This is the gradient of the discrete solution, exact up to rounding, as if you backpropagated through the accepted
    steps. Step sizes count as constants. Rejected steps cost nothing in the gradient.

    The forward solve keeps the length of every step, and at most `num_checkpoints` states: all states as long as they
    fit, then every second one, every fourth one and so on. The gradient computes the states in between again, from one
    checkpoint to the next. For `n` steps this needs the memory of `O(sqrt(n))` states. Under XLA, the amount of memory
    must be known in advance, and `n` is the `max_steps` of the solver.

    This holds for a first derivative. A second derivative replays all steps at once, in memory that grows with `n`.

    Args:
        num_checkpoints: the largest number of states to keep. Defaults to `None`, for the square root of the largest
            number of steps that the solver may take. This is 64 for the default `max_steps=4096`.

    Raises:
        ValueError: if `num_checkpoints` is not a positive integer.

    Example:
        >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=keras_node.CheckpointedAdjoint())
        >>> layer(keras.ops.ones((3, 2))).shape
        TensorShape([3, 2])

    Reference:

        - Griewank & Walther (2000), "Algorithm 799: Revolve", ACM Trans. Math. Softw. 26(1), and (2008), "Evaluating
          Derivatives", chapter 12, on checkpoints. Here they are evenly spaced instead of binomial.
        - Zhuang et al. (2020), "Adaptive Checkpoint Adjoint Method for Gradient Estimation in Neural ODE",
          arXiv:2006.02493.
    """

    def __init__(self, num_checkpoints: int | None = None) -> None:
        if num_checkpoints is not None:
            num_checkpoints = positive_integer("num_checkpoints", num_checkpoints)
        self.num_checkpoints = num_checkpoints

    def __call__(self, problem: Problem) -> Trajectory:
        """Solves the problem with this gradient. The layers and `keras_node.odeint` call it."""
        clock, _ = solve_clock(problem._replace(ts=tf.stop_gradient(problem.ts)))
        max_steps = step_limit(problem.forward_solver, clock)
        slots = self.num_checkpoints or _square_root(max_steps)
        recorder = Recorder(clock, max_steps, slots, problem.exported)
        # The distances between checkpoints are powers of two.
        capacity = 2 ** math.ceil(math.log2(max(1, max_steps / slots))) if isinstance(max_steps, int) else max_steps

        def forward(problem: Problem) -> tuple[Trajectory, tuple]:
            trajectory, (memory,) = solve(problem, [recorder])
            return trajectory, (recorder.result(memory), trajectory.status)

        def backward(problem: Problem, memory: tuple, ys: Nest, dys: Nest) -> tuple[Gradients, Stats, tf.Tensor]:
            del ys
            record, status = memory
            return _backward(problem, record, status, capacity, dys)

        return add_gradient_at_start(problem, solve_with_gradient(problem, forward, backward))

    def get_config(self) -> dict[str, Any]:
        return {"num_checkpoints": self.num_checkpoints}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CheckpointedAdjoint":
        return cls(**config)


def _backward(
    problem: Problem, record: Record, status: tf.Tensor, capacity: int | tf.Tensor, dys: Nest
) -> tuple[Gradients, Stats, tf.Tensor]:
    """The gradients of `y0`, `ts` and `params`, which you can differentiate again: this replays all steps at once."""

    def replay(y0: Nest, ts: tf.Tensor, params: list[tf.Tensor]) -> Replay:
        return Replay(problem._replace(y0=y0, ts=ts, params=params), record, capacity)

    def step_by_step(*arguments: Nest) -> tuple[Gradients, tf.Tensor]:
        *solved, dys = arguments
        return replay(*solved).gradient(dys)

    def at_once(*arguments: Nest) -> tuple[Gradients, tf.Tensor]:
        *solved, dys = arguments
        sources = (*solved[:2], problem.vector_field.sources(solved[2]))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tf.nest.flatten(sources))
            ys = replay(*solved).states(*solved)
        return vjp(tape, ys, sources, dys), tf.constant(0)

    arguments = (problem.y0, problem.ts, problem.params, dys)
    gradients, evaluations = differentiated_as(
        step_by_step, at_once, arguments, problem.vector_field.pure, jit_compile=False
    )
    # The forward solve has reported its failure already, and nothing is solved here that could fail.
    return poisoned(gradients, status), _replay_stats(problem, record, evaluations), tf.constant(int(Status.SUCCESS))


def _replay_stats(problem: Problem, record: Record, further: tf.Tensor) -> Stats:
    """The work of a replay.

    Every step is computed once for its gradient, and once more for its state if that was not kept, or for the stages of
    an implicit method. `further` is the number of evaluations in which steps differ.
    """
    tableau = problem.solver.tableau
    if tableau.implicit:
        # A step takes the first stage, a Jacobian and the iterations. Its derivative takes the first stage, and a
        # Jacobian and an evaluation at all others.
        return Stats.zeros()._replace(
            num_evaluations=(2 + 1 + 2 * (tableau.num_stages - 1)) * record.count + further,
            num_steps=record.count,
            num_factorizations=tableau.num_stages * record.count,
            num_iterations=further,
        )
    # The state after the last step before a checkpoint is not computed.
    replayed = 2 * record.count - (record.count + record.stride - 1) // record.stride
    stages = tableau.num_stages - 1 if tableau.fsal and problem.ts.shape[0] == 2 else tableau.num_stages
    return Stats.zeros()._replace(num_evaluations=stages * replayed + further, num_steps=record.count)


def _square_root(count: int | tf.Tensor) -> int | tf.Tensor:
    """The square root, rounded up."""
    if isinstance(count, int):
        return math.isqrt(count - 1) + 1
    return tf.cast(tf.math.ceil(tf.sqrt(tf.cast(count, tf.float32))), tf.int32)
