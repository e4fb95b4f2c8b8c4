"""The solver's clock: time in the form in which one loop serves every solve.

A clock starts at 0 and only grows, in units of time. In segment `j` it tells the time

    t = times[j] + (reading - stops[j]) * rate[j]

so `rate` is 1 forwards and -1 backwards in time. In a joint solve of samples with intervals of their own, all
share the clock of the longest interval and `rate` is `(batch,)`, between -1 and 1: a shorter interval is run
through more slowly, and one of length zero not at all. With per-sample steps every sample has its own clock.

Readings are constants of differentiation; gradients with respect to times flow through `times` and `rate`.
"""

from typing import NamedTuple

import tensorflow as tf


class Segment(NamedTuple):
    """One segment of a clock, or with per-sample steps one for each sample.

    Attributes:
        start, stop: the readings at its ends.
        first, last: the times there.
        rate: time by reading.
        at_rest: the time between its ends if they have one reading, with a derivative and the value zero; else zero, or
            `None` for the only segment of a clock.
        kinks: whether the field may jump at its ends.
    """

    start: tf.Tensor
    stop: tf.Tensor
    first: tf.Tensor
    last: tf.Tensor
    rate: tf.Tensor
    at_rest: tf.Tensor | None
    kinks: bool

    def time(self, reading: tf.Tensor) -> tf.Tensor:
        return self.inside(tf.add(self.first, tf.multiply(tf.subtract(reading, self.start), self.rate)))

    def duration(self, length: tf.Tensor) -> tf.Tensor:
        """The time that passes, with its sign, while the clock moves on by `length`."""
        duration = tf.multiply(length, self.rate)
        return duration if self.at_rest is None else duration + self.at_rest

    def inside(self, time: tf.Tensor) -> tf.Tensor:
        """`time`, kept off the ends of the segment by the least amount if they are kinks."""
        if not self.kinks:
            return time
        first, last = tf.math.nextafter(self.first, self.last), tf.math.nextafter(self.last, self.first)
        return tf.clip_by_value(time, tf.minimum(first, last), tf.maximum(first, last))


class Clock(NamedTuple):
    """Segments of a solve. A step never leaves its segment, and the last one ends the solve.

    Attributes:
        stops: readings at the ends of the segments, `(S + 1,)`, or `(S + 1, batch)` with per-sample steps.
        times: the times of these readings, `(S + 1,)` or `(S + 1, batch)`.
        rate: time by reading in every segment, `(S,)` or `(S, batch)`.
        kinks: whether the field may jump at the inner stops, so that a segment must not look at its ends.
    """

    stops: tf.Tensor
    times: tf.Tensor
    rate: tf.Tensor
    kinks: bool = False

    @property
    def num_segments(self) -> int | None:
        return None if self.stops.shape[0] is None else self.stops.shape[0] - 1

    @property
    def end(self) -> tf.Tensor:
        return self.stops[-1]

    def segment(self, index: tf.Tensor | int) -> Segment:
        """One segment, or one for each sample."""
        if self.num_segments == 1:
            # Eagerly a subscript takes as long as ten additions.
            (rate,) = tf.unstack(self.rate)
            return Segment(*tf.unstack(self.stops), *tf.unstack(self.times), rate, None, self.kinks)
        # A segment of no length has no rate, yet moving its end would give it one.
        at_rest = tf.where(self._lengths() == 0, self.times[1:] - self.times[:-1], 0)
        return Segment(
            start=pick(self.stops, index),
            stop=pick(self.stops, index + 1),
            first=pick(self.times, index),
            last=pick(self.times, index + 1),
            rate=pick(self.rate, index),
            at_rest=pick(at_rest, index),
            kinks=self.kinks,
        )

    def inside(self, index: tf.Tensor | int, time: tf.Tensor) -> tf.Tensor:
        """`time`, kept off the ends of its segment if they are kinks."""
        return self.segment(index).inside(time) if self.kinks else time

    def read(self, ts: tf.Tensor) -> tf.Tensor:
        """The readings at which it is `ts`, `(T,)` or `(T, batch)`."""
        elapsed = tf.math.divide_no_nan(ts[:, None] - self.times[:-1], self.rate)  # (T, S) or (T, S, batch)
        # The whole of a segment with a later one begun, even where a sample rests in it.
        behind = tf.cumsum(tf.cast(elapsed > 0, tf.int32), axis=1, exclusive=True, reverse=True) > 0
        lengths = self._lengths()
        begun = tf.where(elapsed > 0, tf.minimum(elapsed, lengths), 0)
        passed = tf.where(behind, lengths, begun)
        # Rounding must not put the last time behind the end, where no step arrives.
        return tf.minimum(tf.reduce_sum(passed, axis=1), self.end)

    def _lengths(self) -> tf.Tensor:
        """The lengths of the segments, in the shape of `rate` or one to broadcast with it."""
        lengths = self.stops[1:] - self.stops[:-1]
        return lengths[:, None] if lengths.shape.rank < self.rate.shape.rank else lengths


def make_clock(times: tf.Tensor, per_sample: bool, kinks: bool = False) -> Clock:
    """A clock that stops at every one of `times`, `(S + 1,)` or `(S + 1, batch)`, monotonic along axis 0."""
    spans = times[1:] - times[:-1]
    lengths = tf.stop_gradient(tf.abs(spans))
    if times.shape.rank == 2 and not per_sample:
        lengths = tf.reduce_max(lengths, axis=1)
        rate = tf.math.divide_no_nan(spans, lengths[:, None])
    else:
        rate = tf.math.divide_no_nan(spans, lengths)
    stops = tf.concat([tf.zeros_like(lengths[:1]), tf.cumsum(lengths)], axis=0)
    return Clock(stops, times, rate, kinks)


def merge(times: tf.Tensor, more: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts more times in between monotonic ones; those that lie outside move to the nearer end.

    Args:
        times: `(T,)` or `(T, batch)`, in either direction.
        more: `(M,)`, or `(M, batch)` with the batch of `times`.

    Returns:
        All times, `(T + M, ...)`, and for each of them its index in `times`, or -1. The first and the last stay so.
    """
    first, last = times[0], times[-1]
    if times.shape.rank > more.shape.rank:
        more = tf.tile(more[:, None], [1, tf.shape(times)[1]])
    more = tf.clip_by_value(more, tf.minimum(first, last), tf.maximum(first, last))
    inner = tf.concat([times[1:-1], more], axis=0)
    order = tf.argsort(tf.where(last < first, -inner, inner), axis=0, stable=True)
    inner = take(inner, order)
    count = tf.shape(times)[0]
    index = tf.where(order < count - 2, order + 1, -1)
    ends = tf.zeros_like(index[:1])
    merged = tf.concat([first[None], inner, last[None]], axis=0)
    return merged, tf.concat([ends, index, ends + count - 1], axis=0)


def pick(values: tf.Tensor, index: tf.Tensor | int) -> tf.Tensor:
    """`values[index]` for one index; for one of each sample, `values[index[b]]` or `values[index[b], b]`."""
    if isinstance(index, int):
        return values[index]
    # Not `values[index]`: XLA takes the start of a slice for a constant, and would compile anew for every value
    # that the index may have come from, a network's weights among them.
    if index.shape.rank == 0 or values.shape.rank == 1:
        return tf.gather(values, index)
    return tf.gather_nd(values, tf.stack([index, tf.range(tf.size(index))], axis=1))


def take(values: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """`values[index]`, or with an index `(N, batch)` of every sample's own, `values[index[n, b], b]`."""
    if index.shape.rank == 1:
        return tf.gather(values, index)
    return tf.gather_nd(values, tf.stack([index, tf.zeros_like(index) + tf.range(tf.shape(index)[1])], axis=-1))
