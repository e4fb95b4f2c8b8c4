"""The solver's clock: time in the form in which one loop serves every solve.

A clock starts at 0 and only grows, in units of time. It stops at some of its readings, and from one stop to the next
there is a segment. In segment `j` it tells the time

    t = times[j] + (reading - stops[j]) * speed[j]

so `speed` is 1 forwards and -1 backwards in time. In a joint solve of samples with intervals of their own, all share
the clock of the longest interval and `speed` is `(batch,)`, between -1 and 1: a shorter interval is run through more
slowly, and one of length zero not at all. With per-sample steps every sample has its own clock.

Times come in a precision that tells them apart, which may be higher than that of the state. Their differences are
formed in it, and only then rounded to the state's: that is all that a clock works with.

Readings are constants of differentiation; gradients with respect to times flow through `times` and `speed`. Between
times that coincide there is no segment.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Segment(NamedTuple):
    """One segment of a clock, or with per-sample steps one for each sample.

    Attributes:
        start, stop: the readings at its ends.
        first, last: the times there.
        speed: time per reading.
        kinks: if the field may jump at its ends, the precision in which it tells times apart; else `None`.
    """

    start: tf.Tensor
    stop: tf.Tensor
    first: tf.Tensor
    last: tf.Tensor
    speed: tf.Tensor
    kinks: tf.DType | None

    def time(self, reading: tf.Tensor) -> tf.Tensor:
        return self.inside(tf.add(self.first, tf.multiply(tf.subtract(reading, self.start), self.speed)))

    def inside(self, time: tf.Tensor) -> tf.Tensor:
        """`time`, kept off the ends of the segment by the least amount that the field can see if they are kinks."""
        if self.kinks is None:
            return time
        first, last = tf.cast(self.first, self.kinks), tf.cast(self.last, self.kinks)
        first, last = tf.math.nextafter(first, last), tf.math.nextafter(last, first)
        first, last = tf.cast(first, time.dtype), tf.cast(last, time.dtype)
        return tf.clip_by_value(time, tf.minimum(first, last), tf.maximum(first, last))


class Clock(NamedTuple):
    """Segments of a solve. A step never leaves its segment, and the last one ends the solve.

    Attributes:
        stops: readings at the ends of the segments, `(S + 1,)`, or `(S + 1, batch)` with per-sample steps. They
            increase up to the stop `count`, and stay.
        times: the times of these readings, `(S + 1,)` or `(S + 1, batch)`.
        elapsed: what has passed since the first of the times, with its sign, in the same shape.
        speed: time per reading in every segment, `(S,)` or `(S, batch)`.
        count: how many segments there are, `()`, or `(batch,)` with per-sample steps.
        kinks: if the field may jump at the stops, so that a segment must not look at its ends, the precision in which
            the field tells times apart; else `None`.
    """

    stops: tf.Tensor
    times: tf.Tensor
    elapsed: tf.Tensor
    speed: tf.Tensor
    count: tf.Tensor
    kinks: tf.DType | None = None

    @property
    def num_segments(self) -> int | None:
        """The greatest number that there may be, if it is known."""
        return None if self.stops.shape[0] is None else self.stops.shape[0] - 1

    @property
    def end(self) -> tf.Tensor:
        return self.stops[-1]

    def segment(self, index: tf.Tensor | int) -> Segment:
        """One segment, or one for each sample."""
        if self.num_segments == 1:
            # Eagerly a subscript takes as long as ten additions.
            (speed,) = tf.unstack(self.speed)
            return Segment(*tf.unstack(self.stops), *tf.unstack(self.times), speed, self.kinks)
        return Segment(
            start=pick(self.stops, index),
            stop=pick(self.stops, index + 1),
            first=pick(self.times, index),
            last=pick(self.times, index + 1),
            speed=pick(self.speed, index),
            kinks=self.kinks,
        )

    def inside(self, index: tf.Tensor | int, time: tf.Tensor) -> tf.Tensor:
        """`time`, kept off the ends of its segment if they are kinks."""
        return time if self.kinks is None else self.segment(index).inside(time)

    def readings_at(self, elapsed: tf.Tensor, stops: tf.Tensor | None = None) -> tf.Tensor:
        """The readings when so much time has passed, `(T,)` or `(T, batch)`.

        Args:
            elapsed: since the first time, with its sign.
            stops: the index of the stop at which that is, where it is at one.
        """
        if self.num_segments == 1 and stops is None:
            reading = tf.math.divide_no_nan(elapsed, self.speed[0])
            return tf.minimum(reading, self.end)  # which rounding might pass, where no step arrives
        segment = self._segment_at(elapsed) if stops is None else tf.maximum(stops - 1, 0)
        known = segment if stops is None else stops  # a stop whose reading is the one to count from
        further = tf.math.divide_no_nan(elapsed - reorder(self.elapsed, known), reorder(self.speed, segment))
        reading, stop = (reorder(self.stops, i) for i in (known, segment + 1))
        if reading.shape.rank < further.shape.rank:
            reading, stop = reading[:, None], stop[:, None]
        return tf.minimum(reading + further, stop)

    def _segment_at(self, elapsed):
        """The last segment that begins before so much time has passed, else the first: a search by halving."""
        begins, now = tf.abs(self.elapsed[:-1]), tf.abs(elapsed)
        index = tf.zeros_like(now, dtype=tf.int32)
        for power in reversed(range(int(self.num_segments).bit_length())):
            later = index + 2**power
            begun = reorder(begins, tf.minimum(later, self.num_segments - 1)) < now
            index = tf.where(begun & (later < self.num_segments), later, index)
        return index

    def trimmed(self) -> "Clock":
        """The clock without room for segments that are not there; eagerly."""
        last = max(int(np.max(self.count, initial=1)), 1)
        stops, times, elapsed = (x[: last + 1] for x in self[:3])
        return self._replace(stops=stops, times=times, elapsed=elapsed, speed=self.speed[:last])


def make_clock(
    times: tf.Tensor, dtype: tf.DType, per_sample: bool, kinks: tf.DType | None = None
) -> tuple[Clock, tf.Tensor]:
    """A clock that stops at every one of `times`, and the index of the stop of each.

    Args:
        times: `(N,)` or `(N, batch)`, monotonic along axis 0.
        dtype: the precision of the clock.
        per_sample: whether every sample has a clock of its own where times have a batch axis.
        kinks: if the field may jump at the stops, the precision in which it tells times apart.
    """
    elapsed = tf.cast(times - times[:1], dtype)
    times = tf.cast(times, dtype)
    stops = tf.stop_gradient(tf.abs(elapsed))
    shared = times.shape.rank == 2 and not per_sample
    if shared:
        # In each segment the sample for which the most time passes sets the pace. Of no samples the maximum is -inf.
        lengths = tf.maximum(tf.reduce_max(stops[1:] - stops[:-1], axis=1), 0)
        stops = tf.concat([tf.zeros_like(lengths[:1]), tf.cumsum(lengths)], axis=0)
    moves = tf.cast(stops[1:] > stops[:-1], tf.int32)
    index = tf.concat([tf.zeros_like(moves[:1]), tf.cumsum(moves)], axis=0)
    count = index[-1]
    if times.shape[0] != 2:
        # Times that coincide share a stop: the first of them stands for it, and at the end the last.
        order = tf.argsort(1 - moves, axis=0, stable=True) + 1
        number = tf.reshape(tf.range(1, tf.shape(times)[0]), [-1] + [1] * (order.shape.rank - 1))
        kept = tf.concat([index[:1], tf.where(number < count, order, tf.shape(times)[0] - 1)], axis=0)
        stops, times, elapsed = (reorder(x, kept) for x in (stops, times, elapsed))
    lengths = stops[1:] - stops[:-1]
    speed = tf.math.divide_no_nan(elapsed[1:] - elapsed[:-1], lengths[:, None] if shared else lengths)
    return Clock(stops, times, elapsed, speed, count, kinks), index


def merge(times: tf.Tensor, more: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts more times in between monotonic ones; those that lie outside move to the nearer end.

    Args:
        times: `(T,)` or `(T, batch)`, in either direction.
        more: `(M,)`, or `(M, batch)` with the batch of `times`.

    Returns:
        All times, `(T + M, ...)`, and where each of `times` is among them, `(T, ...)`. The first and the last stay so.
    """
    first, last = times[0], times[-1]
    if times.shape.rank > more.shape.rank:
        more = tf.tile(more[:, None], [1, tf.shape(times)[1]])
    more = tf.clip_by_value(more, tf.minimum(first, last), tf.maximum(first, last))
    # XLA has no gradient of an empty slice.
    inner = more if times.shape[0] == 2 else tf.concat([times[1:-1], more], axis=0)
    order = tf.argsort(tf.where(last < first, -inner, inner), axis=0, stable=True)
    merged = tf.concat([times[:1], reorder(inner, order), times[-1:]], axis=0)
    place = tf.argsort(order, axis=0)[: tf.shape(times)[0] - 2] + 1
    start = tf.zeros_like(first, dtype=tf.int32)[None]
    return merged, tf.concat([start, place, start + tf.shape(merged)[0] - 1], axis=0)


def pick(values: tf.Tensor, index: tf.Tensor | int) -> tf.Tensor:
    """One entry, `values[index]`; with an index of each sample, `values[index[b]]` or `values[index[b], b]`.

    Not a subscript: XLA takes the start of a slice for a constant, and would compile anew for every value that the
    index may have come from, a network's weights among them.
    """
    if isinstance(index, int):
        return values[index]
    if index.shape.rank == 0 or values.shape.rank == 1:
        return tf.gather(values, index)
    return tf.gather_nd(values, tf.stack([index, tf.range(tf.size(index))], axis=1))


def reorder(values: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Several entries, `values[order[n]]`, or with an order of each sample's own, `values[order[n, b], b]`."""
    if order.shape.rank == 1 or values.shape.rank == 1:
        return tf.gather(values, order)
    return tf.gather_nd(values, tf.stack([order, tf.zeros_like(order) + tf.range(tf.shape(order)[1])], axis=-1))
