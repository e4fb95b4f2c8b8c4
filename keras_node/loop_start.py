"""What the time loop knows before its first step: the first evaluations, the first step, and how many may follow."""

from collections.abc import Callable

import tensorflow as tf

from keras_node import trees
from keras_node.clock import Clock, Segment
from keras_node.solvers.runge_kutta import RungeKutta
from keras_node.solvers.step import Rates
from keras_node.step_size import Norm, PIDController, first_step_size
from keras_node.trees import Nest

_LONGER_THAN_ALL = 1e30  # and not infinity, because a converter may write a selection as a product with zero: NaN


def first_evaluations(
    vector_field: Callable[[tf.Tensor, Nest, tf.Tensor], Rates],
    y0: Nest,
    segment: Segment,
    clock: Clock,
    solver: RungeKutta,
    sample_shape: tf.Tensor,
    norm: Norm,
    first_step: tf.Tensor | None,
    needs_rate: bool,
) -> tuple[Nest, tf.Tensor, int]:
    """The `Rates` at the start if they are needed, else `()`; the first step size; the number of evaluations."""
    adaptive_start = solver.adaptive and solver.first_step is None and first_step is None
    speed = segment.speed
    k1: Nest = ()
    evaluations = 0
    if adaptive_start or needs_rate:
        k1, evaluations = vector_field(segment.inside(segment.first), y0, speed), 1
    if first_step is not None:
        return k1, first_step, evaluations
    if not adaptive_start:
        given = solver.step_size or 0.0
        if solver.adaptive:
            assert solver.first_step is not None  # otherwise the step is chosen below
            given = min(solver.first_step, _LONGER_THAN_ALL)
        return k1, tf.fill(sample_shape, tf.constant(given, clock.stops.dtype)), evaluations

    def rate_of_change(reading: tf.Tensor, y: Nest) -> Nest:
        return trees.scale(speed, vector_field(segment.time(reading), y, speed).y)

    assert isinstance(solver.controller, PIDController)  # the solver is adaptive
    step_size = first_step_size(rate_of_change, y0, trees.scale(speed, k1.y), clock.end, solver.controller, norm)
    return k1, step_size, evaluations + 1


def spacing(segment: Segment, solver: RungeKutta) -> tuple[tf.Tensor, tf.Tensor]:
    """The length of constant steps on the clock, and the number of steps in a segment."""
    length = segment.stop - segment.start
    if solver.num_steps is not None:
        return length / solver.num_steps, tf.cast(solver.num_steps, length.dtype)
    spacing = tf.constant(solver.step_size, length.dtype)
    # As with adaptive steps, the last step may be up to 1 % longer.
    return spacing, tf.math.ceil(length / spacing - 0.01)


def step_limit(solver: RungeKutta, clock: Clock) -> int | tf.Tensor:
    """The largest number of steps that a solve may attempt."""
    if solver.num_steps is None:
        return solver.max_steps
    segments = clock.num_segments
    return solver.num_steps * (tf.shape(clock.speed)[0] if segments is None else segments)
