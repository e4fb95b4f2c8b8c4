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


class Clock(NamedTuple):
    """Segments of a solve. A step never leaves its segment, and the last one ends the solve.

    Attributes:
        stops: readings at the ends of the segments, `(S + 1,)`, or `(S + 1, batch)` with per-sample steps.
        times: the times of these readings, `(S + 1,)` or `(S + 1, batch)`.
        rate: time by reading in every segment, `(S,)` or `(S, batch)`.
    """

    stops: tf.Tensor
    times: tf.Tensor
    rate: tf.Tensor

    @property
    def num_segments(self) -> int | None:
        return None if self.stops.shape[0] is None else self.stops.shape[0] - 1

    @property
    def end(self) -> tf.Tensor:
        return self.stops[-1]

    def time(self, segment: tf.Tensor, reading: tf.Tensor) -> tf.Tensor:
        elapsed = reading - pick(self.stops, segment)
        return pick(self.times, segment) + elapsed * pick(self.rate, segment)

    def read(self, ts: tf.Tensor) -> tf.Tensor:
        """The readings at which it is `ts`, for a clock that runs at one rate."""
        readings = tf.math.divide_no_nan(ts - self.times[0], self.rate[0])
        # Rounding must not put the last time behind the end, where no step arrives.
        return tf.minimum(tf.maximum(readings, 0), self.end)


def make_clock(times: tf.Tensor, per_sample: bool) -> Clock:
    """A clock that stops at every one of `times`, `(S + 1,)` or `(S + 1, batch)`, monotonic along axis 0."""
    spans = times[1:] - times[:-1]
    lengths = tf.stop_gradient(tf.abs(spans))
    if times.shape.rank == 2 and not per_sample:
        lengths = tf.reduce_max(lengths, axis=1)
        rate = tf.math.divide_no_nan(spans, lengths[:, None])
    else:
        rate = tf.math.divide_no_nan(spans, lengths)
    stops = tf.concat([tf.zeros_like(lengths[:1]), tf.cumsum(lengths)], axis=0)
    return Clock(stops, times, rate)


def pick(values: tf.Tensor, index: tf.Tensor | int) -> tf.Tensor:
    """`values[index]` for one index; for one of each sample, `values[index[b]]` or `values[index[b], b]`."""
    if isinstance(index, int):
        return values[index]
    # Not `values[index]`: XLA takes the start of a slice for a constant, and would compile anew for every value
    # that the index may have come from, a network's weights among them.
    if index.shape.rank == 0 or values.shape.rank == 1:
        return tf.gather(values, index)
    return tf.gather_nd(values, tf.stack([index, tf.range(tf.size(index))], axis=1))
