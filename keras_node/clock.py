"""The clock of a solve, which lets the same time loop do every kind of solve.

A clock starts at 0 and only grows, in units of time. It stops at some readings, and the part from one stop to the next
is a segment. A reading in segment `j` means the time

    t = times[j] + (reading - stops[j]) * speed[j]

so `speed` is 1 in a solve forward in time, and -1 backward. In a joint solve of samples that have their own intervals,
all samples share the clock of the longest interval. Then `speed` is `(batch,)`, with values between -1 and 1: time
passes more slowly in a shorter interval, and does not move in an interval of length zero. With per-sample steps, every
sample has its own clock.

Times come in a precision that tells them apart, which may be higher than the precision of the state. Their differences
are formed in this precision, and only then rounded to that of the state. The readings are made of these differences.

No gradient flows through a reading. Gradients with respect to times flow through `times` and `speed`. There is no
segment between times that coincide.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Segment(NamedTuple):
    """One segment of a clock, or with per-sample steps one for each sample.

    Attributes:
        start, stop: the readings at its ends.
        first, last: the times at its ends.
        speed: the time that passes per unit of the reading.
        kinks: the precision in which the field tells times apart, if it may jump at the ends; otherwise `None`.
    """

    start: tf.Tensor
    stop: tf.Tensor
    first: tf.Tensor
    last: tf.Tensor
    speed: tf.Tensor
    kinks: tf.DType | None

    def time(self, reading: tf.Tensor) -> tf.Tensor:
        """The time at a reading."""
        return self.inside(tf.add(self.first, tf.multiply(tf.subtract(reading, self.start), self.speed)))

    def inside(self, time: tf.Tensor) -> tf.Tensor:
        """Moves `time` off the ends of the segment, if these are kinks, by the least amount that the field can see."""
        if self.kinks is None:
            return time
        first, last = tf.cast(self.first, self.kinks), tf.cast(self.last, self.kinks)
        first, last = tf.math.nextafter(first, last), tf.math.nextafter(last, first)
        first, last = tf.cast(first, time.dtype), tf.cast(last, time.dtype)
        return tf.clip_by_value(time, tf.minimum(first, last), tf.maximum(first, last))


class Clock(NamedTuple):
    """The segments of a solve. A step never leaves its segment, and the solve ends with the last segment.

    Attributes:
        stops: the readings at the ends of the segments, `(S + 1,)`, or `(S + 1, batch)` with per-sample steps. They
            increase up to the stop number `count`, and are all equal after it.
        times: the times at these readings, `(S + 1,)` or `(S + 1, batch)`.
        elapsed: the signed time since the first of `times`, in the same shape.
        speed: the time that passes per unit of the reading in each segment, `(S,)` or `(S, batch)`.
        count: the number of segments, `()`, or `(batch,)` with per-sample steps.
        kinks: the precision in which the field tells times apart, if it may jump at the stops; otherwise `None`. With
            kinks, the field is not evaluated exactly at the ends of a segment.
    """

    stops: tf.Tensor
    times: tf.Tensor
    elapsed: tf.Tensor
    speed: tf.Tensor
    count: tf.Tensor
    kinks: tf.DType | None = None

    @property
    def num_segments(self) -> int | None:
        """The largest possible number of segments, or `None` if it is not known."""
        return None if self.stops.shape[0] is None else self.stops.shape[0] - 1

    @property
    def end(self) -> tf.Tensor:
        """The reading at which the solve ends."""
        return tf.unstack(self.stops)[-1] if self.num_segments == 1 else self.stops[-1]

    def segment(self, index: tf.Tensor | int) -> Segment:
        """One segment, or one for each sample."""
        if self.num_segments == 1:
            # In eager mode, a subscript takes as long as ten additions.
            (speed,) = tf.unstack(self.speed)
            start, stop = tf.unstack(self.stops)
            first, last = tf.unstack(self.times)
            return Segment(start, stop, first, last, speed, self.kinks)
        return Segment(
            start=pick(self.stops, index),
            stop=pick(self.stops, index + 1),
            first=pick(self.times, index),
            last=pick(self.times, index + 1),
            speed=pick(self.speed, index),
            kinks=self.kinks,
        )

    def inside(self, index: tf.Tensor | int, time: tf.Tensor) -> tf.Tensor:
        """Moves `time` off the ends of its segment, if these are kinks."""
        return time if self.kinks is None else self.segment(index).inside(time)

    def readings_at(self, elapsed: tf.Tensor, stops: tf.Tensor | None = None) -> tf.Tensor:
        """The readings at which the time `elapsed` has passed, `(T,)` or `(T, batch)`.

        Args:
            elapsed: the signed time since the first time.
            stops: the indices of the stops at these times, if all of them are stops; otherwise `None`.
        """
        if self.num_segments == 1 and stops is None:
            reading = tf.math.divide_no_nan(elapsed, self.speed[0])
            return tf.minimum(reading, self.end)  # rounding may pass the end, which no step does
        segment = self._segment_at(elapsed) if stops is None else tf.maximum(stops - 1, 0)
        known = segment if stops is None else stops  # the stop from which to count
        further = tf.math.divide_no_nan(elapsed - reorder(self.elapsed, known), reorder(self.speed, segment))
        reading, stop = (reorder(self.stops, i) for i in (known, segment + 1))
        if reading.shape.rank < further.shape.rank:
            reading, stop = reading[:, None], stop[:, None]
        return tf.minimum(reading + further, stop)

    def _segment_at(self, elapsed: tf.Tensor) -> tf.Tensor:
        """The last segment that begins before the time `elapsed` has passed, or else the first, by binary search."""
        assert self.num_segments is not None  # only clocks that stop at all of `ts` may have an unknown number
        begins, now = tf.abs(self.elapsed[:-1]), tf.abs(elapsed)
        index = tf.zeros_like(now, dtype=tf.int32)
        for power in reversed(range(self.num_segments.bit_length())):
            later = index + 2**power
            begun = reorder(begins, tf.minimum(later, self.num_segments - 1)) < now
            index = tf.where(begun & (later < self.num_segments), later, index)
        return index

    def trimmed(self) -> "Clock":
        """The clock without unused segments after the last one. It works in eager mode only."""
        if self.num_segments == 1:
            return self
        last = max(int(np.max(self.count, initial=1)), 1)
        stops, times, elapsed = (x[: last + 1] for x in self[:3])
        return self._replace(stops=stops, times=times, elapsed=elapsed, speed=self.speed[:last])


def make_clock(
    times: tf.Tensor, dtype: tf.DType, per_sample: bool, kinks: tf.DType | None = None
) -> tuple[Clock, tf.Tensor]:
    """Makes a clock that stops at each of `times`.

    Args:
        times: `(N,)` or `(N, batch)`, monotonic along axis 0.
        dtype: the precision of the clock.
        per_sample: whether every sample has its own clock, if `times` have a batch axis.
        kinks: the precision in which the field tells times apart, if it may jump at the stops; otherwise `None`.

    Returns:
        The clock, and for each of `times` the index of its stop.
    """
    elapsed = tf.cast(times - times[:1], dtype)
    times = tf.cast(times, dtype)
    stops = tf.stop_gradient(tf.abs(elapsed))
    lengths = _differences(stops)
    shared = times.shape.rank == 2 and not per_sample
    if shared:
        # The sample for which the most time passes sets the length of a segment. An empty batch has the maximum -inf.
        lengths = tf.maximum(tf.reduce_max(lengths, axis=1), 0)
        stops = _sums(lengths)
    moves = tf.cast(lengths > 0, tf.int32)
    index = _sums(moves)
    count = tf.reduce_sum(moves, axis=0)
    if times.shape[0] != 2:
        # Times that coincide share a stop. It takes the first of them, and the last stop takes the last one.
        order = tf.argsort(1 - moves, axis=0, stable=True) + 1
        number = tf.reshape(tf.range(1, tf.shape(times)[0]), [-1] + [1] * (order.shape.rank - 1))
        kept = tf.concat([index[:1], tf.where(number < count, order, tf.shape(times)[0] - 1)], axis=0)
        stops, times, elapsed = (reorder(x, kept) for x in (stops, times, elapsed))
        lengths = _differences(stops)
    speed = tf.math.divide_no_nan(_differences(elapsed), lengths[:, None] if shared else lengths)
    return Clock(stops, times, elapsed, speed, count, kinks), index


def _differences(x: tf.Tensor) -> tf.Tensor:
    """The differences of entries that follow each other on axis 0."""
    if x.shape[0] == 2:
        first, last = tf.split(x, 2)  # in eager mode in a quarter of the time of two subscripts
        return tf.subtract(last, first)
    return x[1:] - x[:-1]


def _sums(x: tf.Tensor) -> tf.Tensor:
    """The sums of the first entries on axis 0: of none, of one, and so on."""
    return tf.pad(tf.cumsum(x), [[1, 0], *[[0, 0]] * (x.shape.rank - 1)])


def merge(times: tf.Tensor, more: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Inserts more times between monotonic ones. Times that lie outside move to the nearer end.

    Args:
        times: `(T,)` or `(T, batch)`, in either direction.
        more: `(M,)`, or `(M, batch)` with the batch of `times`.

    Returns:
        All times, `(T + M, ...)`, and the index of each of `times` among them, `(T, ...)`. The first of `times` remains
        the first, and the last remains the last.
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
    """Returns one entry, `values[index]`, or with an index per sample `values[index[b]]` or `values[index[b], b]`.

    This replaces a subscript, because XLA treats the start of a slice as a constant. It would compile again whenever
    something changes on which the index depends, such as the weights of a network.
    """
    if isinstance(index, int):
        return values[index]
    if index.shape.rank == 0 or values.shape.rank == 1:
        return tf.gather(values, index)
    return tf.gather_nd(values, tf.stack([index, tf.range(tf.size(index))], axis=1))


def reorder(values: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Returns several entries, `values[order[n]]`, or with an order per sample `values[order[n, b], b]`."""
    if order.shape.rank == 1 or values.shape.rank == 1:
        return tf.gather(values, order)
    return tf.gather_nd(values, tf.stack([order, tf.zeros_like(order) + tf.range(tf.shape(order)[1])], axis=-1))
