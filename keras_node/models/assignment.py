"""Pairs two sets of points so that the distances are small: the auction algorithm of Bertsekas, in TensorFlow."""

import tensorflow as tf

# The tolerance of the auction, relative to the mean squared distance of pairs at random. With 256 points in the plane,
# 0.01 takes about four times as many rounds, and the squared distances are 5 to 10 % less.
_TOLERANCE = 0.05

# One part in so many of the points bids in a round. The last rounds have few bidders, and the work of a round is
# proportional to their number. The number of rounds hardly depends on it.
_PARTS = 8


def assignment(x: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Returns a permutation that pairs `x[i]` with `z[permutation[i]]`, with a small sum of squared distances.

    Each `z` bids for the `x` that is worth most to it. It raises the price by what this `x` is worth more than the
    second best, plus a tolerance, and the former owner must bid again. If the auction ends, the mean squared distance
    is at most by the tolerance greater than the least one. It is stopped after as many rounds as there are points, and
    then those that own nothing, usually fewer than one in a hundred, get what is left. So the result is always a
    permutation.

    No gradient flows through the pairing. Time and memory grow with the square of the number of points.

    Args:
        x: points, `(n, dim)`.
        z: as many other points, `(n, dim)`.

    Returns:
        The permutation, `(n,)`, of dtype int32.

    Reference:

        - Bertsekas (1988), "The Auction Algorithm: A Distributed Relaxation Method for the Assignment Problem".
    """
    # Neither the place nor the scale of the points changes which pairs are best, so neither should matter here.
    x, z = (_standardized(tf.stop_gradient(points)) for points in (x, z))
    n = tf.shape(x)[0]
    # The mean squared distance is then 2. Half a squared distance is 1 on average, less the product of the two points.
    tolerance = tf.cast(_TOLERANCE, x.dtype)
    # Slot `n` takes what belongs to nobody. It is worth nothing to anybody.
    worth = tf.pad(tf.matmul(z, x, transpose_b=True), [[0, 0], [0, 1]], constant_values=x.dtype.min)
    bidders = -(-n // _PARTS)
    slots = tf.range(n + 1)

    def goes_on(rounds: tf.Tensor, prices: tf.Tensor, owners: tf.Tensor, owns: tf.Tensor) -> tf.Tensor:
        return (rounds < n) & ~tf.reduce_all(owns[:n])

    def bid(rounds: tf.Tensor, prices: tf.Tensor, owners: tf.Tensor, owns: tf.Tensor) -> tuple:
        missing, rows = tf.math.top_k(tf.cast(~owns[:n], tf.int32), bidders)
        values = tf.gather(worth, rows) - prices
        wanted = tf.argmax(values, axis=1, output_type=tf.int32)
        best = tf.reduce_max(values, axis=1)
        others = tf.where(wanted[:, None] == slots, values.dtype.min, values)
        offers = tf.gather(prices, wanted) + best - tf.reduce_max(others, axis=1) + tolerance
        # Of several offers for the same point the highest one wins, and of equal ones the first.
        offers = tf.where(missing == 1, offers, offers.dtype.min)
        order = tf.range(bidders)
        beaten_by = (offers > offers[:, None]) | ((offers == offers[:, None]) & (order < order[:, None]))
        wins = (missing == 1) & ~tf.reduce_any(beaten_by & (wanted == wanted[:, None]), axis=1)
        place = tf.where(wins, wanted, n)[:, None]
        before, now = (tf.where(wins, row, n)[:, None] for row in (tf.gather(owners, wanted), rows))
        owns = tf.tensor_scatter_nd_update(owns, before, tf.zeros_like(wins))
        owns = tf.tensor_scatter_nd_update(owns, now, tf.ones_like(wins))
        prices = tf.tensor_scatter_nd_update(prices, place, tf.where(wins, offers, 0))
        return rounds + 1, prices, tf.tensor_scatter_nd_update(owners, place, rows), owns

    start = 0, tf.zeros((n + 1,), x.dtype), tf.fill((n + 1,), n), tf.fill((n + 1,), False)
    _, _, owners, owns = tf.while_loop(goes_on, bid, start)
    owners, owns = owners[:n], owns[:n]
    free = owners == n
    rest = tf.argsort(tf.cast(owns, tf.int32), stable=True)  # those that own nothing come first
    return tf.where(free, tf.gather(rest, tf.maximum(tf.cumsum(tf.cast(free, tf.int32)) - 1, 0)), owners)


def _standardized(points: tf.Tensor) -> tf.Tensor:
    """Returns the points with mean 0 and mean square 1."""
    points -= tf.reduce_mean(points, axis=0)
    return tf.math.divide_no_nan(points, tf.sqrt(tf.reduce_mean(tf.reduce_sum(points**2, axis=1))))
