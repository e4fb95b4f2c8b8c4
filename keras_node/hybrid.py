"""Solves of hybrid systems, whose state moves continuously and jumps now and then.

A solve is a series of phases. In a phase the state moves without a jump, from the end of the phase before to the next
event, to the next jump whose time is known, or to the last time. Every sample has its own phases. So each phase is an
ordinary solve that starts and ends at its own time in every sample, and has the gradient of an ordinary solve.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_node import trees
from keras_node.clock import pick
from keras_node.event_detector import EventDetector
from keras_node.event_functions import EventFunctions
from keras_node.events import EventHistory
from keras_node.jumps import Jumps, prepare_jumps
from keras_node.solution import Stats, Status
from keras_node.solve import Problem, Stop, Trajectory
from keras_node.trees import Nest


def solve_hybrid(
    problem: Problem,
    gradient: Callable[[Problem], Trajectory],
    functions: EventFunctions | None,
    jumps: Any,
    max_events: int,
) -> tuple[Trajectory, EventHistory | None]:
    """Solves a problem with events and jumps.

    Args:
        problem: the problem without them.
        gradient: how to differentiate a phase.
        functions: the events, or `None`.
        jumps: a pair of times and amounts, or `None`.
        max_events: the largest number of events of a sample.

    Returns:
        The trajectory, in which a sample stands still after a terminal event, and the events.
    """
    # The times of phases are known only as the solve goes on.
    problem = problem._replace(numbers=None)
    solve = HybridSolve(problem, gradient, functions, max_events)
    if jumps is not None:
        solve.jumps = prepare_jumps(jumps, solve.ts, problem.y0)
    return solve()


class _Phase(NamedTuple):
    """What the next phase starts with. Everything has a batch axis."""

    t: tf.Tensor
    y: Nest
    ys: Nest  # the states at the times of the solve, as far as they are known
    next_jump: tf.Tensor
    sides: tf.Tensor  # on which side of zero each event function was before
    fired: tf.Tensor  # the event at which the phase starts, or -1
    fired_rate: tf.Tensor  # the rate of change of its function when it fired
    done: tf.Tensor
    status: tf.Tensor
    stats: Stats
    history: EventHistory


class HybridSolve:
    """A solve with events and jumps.

    Args:
        problem: the problem without them, with times that are a tensor.
        gradient: how to differentiate a phase.
        functions: the events, or `None`.
        max_events: the largest number of events of a sample.

    Attributes:
        jumps: the jumps at known times, or `None`.
    """

    def __init__(
        self,
        problem: Problem,
        gradient: Callable[[Problem], Trajectory],
        functions: EventFunctions | None,
        max_events: int,
    ) -> None:
        self.problem = problem
        self.gradient = gradient
        self.functions = functions
        self.jumps: Jumps | None = None
        events = [] if functions is None else functions.events
        self.terminal = [event.terminal for event in events]
        self.directions = [event.direction for event in events]
        self.resets = [event.reset is not None for event in events]
        self.acts = [event.terminal or event.reset is not None for event in events]
        self.goes_on = not all(self.terminal)
        self.max_events = max_events if self.goes_on else 1
        zeros = tf.zeros(tf.shape(tf.nest.flatten(problem.y0)[0])[:1], tf.int32)
        self.no_event = zeros - 1
        ts = problem.ts if problem.ts.shape.rank == 2 else problem.ts[:, None]
        self.ts = ts + tf.cast(zeros, ts.dtype)
        # XLA has no gradient of an empty slice, so two times have no times between them instead of none of them.
        self.between = () if self.ts.shape[0] == 2 else self.ts[1:-1]

    def __call__(self) -> tuple[Trajectory, EventHistory | None]:
        """Solves the problem."""
        start = self._start()
        if self.jumps is None and not self.goes_on:
            end = self._advance(start, self.problem._replace(ts=self.ts))
        else:
            most = 1 + (self.max_events if self.goes_on else 0) + (0 if self.jumps is None else self.jumps.number)
            (end,) = tf.while_loop(
                lambda phase: ~tf.reduce_all(phase.done),
                lambda phase: (self._advance(phase),),
                (start,),
                maximum_iterations=most,
            )
        # A sample stands still where its last phase has ended. A failure makes the value NaN but not the derivative, so
        # that a loss can leave the sample out.
        failed = trees.poison(end.status != 0, end.y)
        last = tf.nest.map_structure(lambda y, value: y + tf.stop_gradient(value - y), end.y, failed)
        if self.ts.shape[0] == 2:
            ys = tf.nest.map_structure(lambda a, b: tf.stack([a, b]), self.problem.y0, last)
        else:
            reached = ~self._is_before(end.t, self.between)

            def leaf(y0: tf.Tensor, y: tf.Tensor, y1: tf.Tensor) -> tf.Tensor:
                return tf.concat([y0[None], _where(reached, y, y1), y1[None]], axis=0)

            ys = tf.nest.map_structure(leaf, self.problem.y0, end.ys, last)
        return Trajectory(ys, end.stats, end.status), None if self.functions is None else _marked(end.history)

    def _start(self) -> _Phase:
        """The beginning of the first phase."""
        problem, zeros = self.problem, self.no_event + 1

        def rows(like: tf.Tensor) -> tf.Tensor:
            return tf.repeat(tf.zeros_like(like)[None], self.max_events, axis=0)

        # Times that equal the first one have its state, and no phase reaches them.
        size = tf.shape(self.ts)[0] - 2
        ys = tf.nest.map_structure(lambda y: tf.repeat(y[None], size, axis=0), problem.y0)
        history = EventHistory(
            ts=rows(self.ts[0]),
            index=rows(zeros) - 1,
            ys=tf.nest.map_structure(rows, problem.y0),
            count=zeros,
        )
        work = zeros if self.functions is not None or problem.solver.per_sample else tf.constant(0)
        return _Phase(
            t=self.ts[0],
            y=problem.y0,
            ys=() if self.ts.shape[0] == 2 else ys,
            next_jump=zeros,
            sides=tf.zeros([len(self.terminal), tf.size(zeros)], problem.dtype),
            fired=self.no_event,
            fired_rate=tf.cast(zeros, problem.dtype),
            done=zeros < 0,
            status=zeros,
            stats=Stats(*[work] * len(Stats._fields)),
            history=history,
        )

    def _advance(self, phase: _Phase, problem: Problem | None = None) -> _Phase:
        """Solves to the end of a phase.

        Args:
            phase: the beginning of the phase.
            problem: the problem of the phase, if it is the only one.
        """
        end, more = self.ts[-1], phase.done & False
        if self.jumps is not None:
            more = (phase.next_jump < self.jumps.number) & ~phase.done
            end = tf.where(more, pick(self.jumps.ts, phase.next_jump), end)
        end = tf.where(phase.done, phase.t, end)
        trajectory = self.gradient(self._problem(phase, end, problem))
        status = tf.where(phase.done, phase.status, trajectory.status)
        solved = (status == int(Status.SUCCESS)) & ~phase.done
        t, y = end, tf.nest.map_structure(lambda states: states[-1], trajectory.ys)
        after, index, sides, rate = y, self.no_event, phase.sides, phase.fired_rate
        if isinstance(trajectory.stop, Stop):
            index, sides = tf.where(solved, trajectory.stop.index, -1), trajectory.stop.sides
            stopped = tf.where(index >= 0, trajectory.stop.time, end)
            # A loop of at most one round, because converters to other formats know it better than a condition.
            t, y, after, passes, rate, _ = tf.while_loop(
                lambda *values: values[-1],
                lambda t, y, *_: (*self._land(t, y, index, sides, phase.t, end), False),
                (stopped, y, y, solved, rate, tf.reduce_any(index >= 0)),
                maximum_iterations=1,
            )
            # Nothing depends on the moment of an event that is only noted.
            status = tf.where(_is_among(index, self.acts) & ~passes, int(Status.GRAZING_EVENT), status)
        happened = (index >= 0) & (status == int(Status.SUCCESS))
        too_many = happened & (phase.history.count >= self.max_events)
        status = tf.where(too_many, int(Status.MAX_EVENTS), status)
        happened = happened & ~too_many
        jumps = solved & (index < 0) & more
        if self.jumps is not None:
            amount = tf.nest.map_structure(lambda a: pick(a, phase.next_jump), self.jumps.amounts)
            after = trees.where(jumps, trees.add(y, amount), after)
        # At the last time the state is the one before a jump or a reset, so nothing comes after it.
        goes_on = (jumps | (happened & ~_is_among(index, self.terminal))) & self._is_before(t, self.ts[-1])
        failed = status != int(Status.SUCCESS)
        here = trees.where(goes_on, after, trees.where(failed | phase.done, phase.y, y))
        return _Phase(
            t=t,
            y=here,
            ys=self._outputs(phase, t, trajectory.ys),
            next_jump=phase.next_jump + tf.cast(jumps, tf.int32),
            sides=sides,
            fired=tf.where(happened & goes_on, index, -1),
            fired_rate=rate,
            done=~goes_on,
            status=status,
            stats=Stats(*[a + b for a, b in zip(phase.stats, trajectory.stats, strict=True)]),
            history=_noted(phase.history, happened, t, index, y),
        )

    def _problem(self, phase: _Phase, end: tf.Tensor, problem: Problem | None) -> Problem:
        """The problem of a phase that ends at `end`, or earlier at an event."""
        detector, own = None, self.problem
        if self.functions is not None:
            detector = EventDetector(
                self.functions.values(with_gradient=False),
                self.directions,
                self.resets,
                origin=tf.stop_gradient(phase.t),
                span=tf.stop_gradient(tf.cast(self.ts[-1] - self.ts[0], own.dtype)),
                joint=not own.solver.per_sample,
                sides=phase.sides,
                fired=phase.fired,
                fired_rate=phase.fired_rate,
            )
        if problem is not None:
            return problem._replace(detector=detector)
        ts = tf.stack([phase.t, end])
        if self.ts.shape[0] != 2:
            low, high = tf.minimum(phase.t, end), tf.maximum(phase.t, end)
            ts = tf.concat([ts[:1], tf.clip_by_value(self.between, low, high), ts[1:]], axis=0)
        # TensorFlow cannot update a metric in the gradient of a loop.
        return own._replace(y0=phase.y, ts=ts, times_vary=True, on_backward=None, detector=detector, is_phase=True)

    def _land(
        self, t: tf.Tensor, y: Nest, index: tf.Tensor, sides: tf.Tensor, start: tf.Tensor, end: tf.Tensor
    ) -> tuple[tf.Tensor, Nest, Nest, tf.Tensor, tf.Tensor]:
        """The times of events, the states before and after, whether events happen at all, and rates of functions.

        Args:
            t: where the solver has landed.
            y: the states there.
            index: the number of the event of each sample.
            sides: on which side of zero each function was.
            start: the times at which the phase starts.
            end: the times at which it ends if no event happens. The event is not after it.
        """
        assert self.functions is not None
        problem = self.problem
        now = tf.cast(t, problem.dtype)
        ahead = tf.reduce_sum(tf.where(tf.range(len(self.terminal))[:, None] == index, sides, 0), axis=0)
        ahead = ahead * tf.sign(tf.cast(self.ts[-1] - self.ts[0], problem.dtype))
        dt, y, passes, rate = self.functions.land(
            lambda t, y: problem.vector_field(t, y, problem.params), now, y, index, ahead
        )
        after = self.functions.reset(now + dt, y, index)
        t = t + tf.cast(dt, t.dtype)
        # By its rounding error, the correction may lead out of the phase. The derivative is that of the event.
        inside = tf.clip_by_value(t, tf.minimum(start, end), tf.maximum(start, end))
        return t + tf.stop_gradient(inside - t), y, after, passes, rate

    def _outputs(self, phase: _Phase, t: tf.Tensor, ys: Nest) -> Nest:
        """The states at the times of the solve, with those that lie in a phase that has ended at `t`."""
        if self.ts.shape[0] == 2:
            return ()
        inside = self._is_before(phase.t, self.between) & ~self._is_before(t, self.between) & ~phase.done
        return tf.nest.map_structure(lambda new, old: _where(inside, new[1:-1], old), ys, phase.ys)

    def _is_before(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        """Whether a solve reaches the time `a` before it reaches `b`."""
        return tf.where(self.ts[-1] < self.ts[0], a > b, a < b)


def _is_among(index: tf.Tensor, flags: list[bool]) -> tf.Tensor:
    """Whether an event is one of those with a flag. The index -1 is none of them."""
    return tf.gather(tf.constant([0, *map(int, flags)]), index + 1) > 0


def _noted(history: EventHistory, happened: tf.Tensor, t: tf.Tensor, index: tf.Tensor, y: Nest) -> EventHistory:
    """The history with one more event of the samples in which one has happened."""
    rows = tf.range(tf.shape(history.ts)[0])[:, None]
    here = (rows == history.count) & happened
    return EventHistory(
        ts=tf.where(here, t, history.ts),
        index=tf.where(here, index, history.index),
        ys=tf.nest.map_structure(lambda new, old: _where(here, new[None], old), y, history.ys),
        count=history.count + tf.cast(happened, tf.int32),
    )


def _marked(history: EventHistory) -> EventHistory:
    """The history with NaN where there was no event."""
    happened = tf.cast(history.index >= 0, tf.nest.flatten(history.ys)[0].dtype)
    # The quotient is 1 or NaN. A converter may write a selection as a sum of products, which would always be NaN.
    mark = happened / happened

    def leaf(y: tf.Tensor) -> tf.Tensor:
        return y * trees.expand(mark, y.shape.rank)

    ts = history.ts * tf.cast(mark, history.ts.dtype)
    return history._replace(ts=ts, ys=tf.nest.map_structure(leaf, history.ys))


def _where(mask: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Selects states by a mask `(T, batch)`."""
    return tf.where(trees.expand(mask, x.shape.rank), x, y)
