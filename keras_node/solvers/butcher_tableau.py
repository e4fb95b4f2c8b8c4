"""The Butcher tableau of a Runge-Kutta method: data that checks itself.

A step from `(t, y)` over `dt`, in the notation of Hairer, Norsett & Wanner (HNW), II.1 and II.6:

    k_i             = f(t + c_i dt, y + dt sum_j a_ij k_j)
    y1              = y + dt sum_i b_i k_i
    error           = dt sum_i b_error_i k_i
    y(t + theta dt) = y + dt sum_i b_i(theta) k_i,    b_i(theta) = sum_j b_dense_ij theta^j

In an explicit method the sum over `j` ends before `i`. An implicit one (ESDIRK) has the same number, `gamma`, at
`j = i` in all stages but the first, which is explicit. So the unknown of each of these stages is its own `k_i`.

The dense output uses only the stages of the step, so it needs no further evaluation of the field. A method of high
order may have further stages, `a_dense`, which are computed only where the dense output is needed.

A symplectic method is explicit, and each of its stages moves one half of the state: the positions, at a rate that
depends on the velocities alone, or the velocities, at a rate that depends on the positions alone. The other half of
`k_i` is zero. So the conditions above hold for each half separately.

References:
    Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", 2nd edition:
    II.2 for rooted trees and order conditions, II.6 for the order conditions of dense output.
    Hairer & Wanner (1996), "Solving Ordinary Differential Equations II", IV.3 for stability at infinity.
    Hairer, Lubich & Wanner (2006), "Geometric Numerical Integration", II.2 and III.2 for symplectic methods.
"""

import functools
from dataclasses import dataclass
from math import comb

import numpy as np

from keras_node.solvers.rooted_trees import alternating_weights, elementary_weights, rooted_trees


def _equal(actual: np.ndarray, expected: np.ndarray | float, size: np.ndarray) -> np.ndarray:
    """Whether values are equal up to rounding. `size` is the sum of the magnitudes of the terms of `actual`."""
    return np.abs(actual - expected) <= 1e-13 * (1 + size)


@dataclass(frozen=True, kw_only=True)
class ButcherTableau:
    """Coefficients of a Runge-Kutta method, its error estimate and its dense output.

    All coefficients are tuples of Python numbers. The constructor checks their shapes, the row sums
    and every order condition up to the given orders.

    Args:
        name: String. The name by which a user selects the method.
        order: Integer. Order of the step: its local error is `O(dt**(order + 1))`.
        a: Tuple of `num_stages - 1` rows. The row of the second stage holds one number, and every
            next row holds one more. The diagonal is not part of it.
        b: Tuple of `num_stages` numbers. Weights of the stages in the step.
        c: Tuple of `num_stages` numbers. Times of the stages, as fractions of the step.
        b_dense: Tuple of `num_stages` rows, and one more for each further stage. Row `i` holds the
            coefficients of `theta, theta**2, ...` in the weight of stage `i` in the dense output.
        dense_order: Integer. Order of the dense output at every `theta`: its local error is
            `O(dt**(dense_order + 1))`.
        b_error: Tuple of `num_stages` numbers: `b` minus the weights of the embedded method.
            `None` for a method that has no embedded one.
        error_order: Integer. The order of the embedded method plus one, so that the error estimate
            behaves like `dt**error_order`. `None` without `b_error`.
        a_dense: Tuple of rows. The further stages that only the dense output of an explicit method
            needs. Each row is one number longer than the one before it. Empty for most methods.
        c_dense: Tuple of as many numbers: their times, as fractions of the step.
        gamma: Number. The diagonal of `a` in all stages but the first, which is 0 for an explicit method.
        halves: Tuple of `num_stages` integers, of a symplectic method only: the half of the state that each stage
            moves, 0 for positions and 1 for velocities. The times `c` are those of the positions.

    Raises:
        ValueError: if a condition does not hold. The message names the tableau and the condition.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    b_dense: tuple[tuple[float, ...], ...]
    dense_order: int
    b_error: tuple[float, ...] | None = None
    error_order: int | None = None
    a_dense: tuple[tuple[float, ...], ...] = ()
    c_dense: tuple[float, ...] = ()
    gamma: float = 0
    halves: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        """Number of stages, including the one that a step shares with the next if the method is FSAL."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage, `f(t + dt, y1)`, is also the first stage of the next step."""
        return self.num_stages > 1 and self.c[-1] == 1 and (*self.a[-1], self.gamma) == self.b

    @property
    def implicit(self) -> bool:
        """Whether the stages are solutions of equations."""
        return self.gamma != 0

    @property
    def symplectic(self) -> bool:
        """Whether every stage moves one half of the state."""
        return bool(self.halves)

    @property
    def embedded(self) -> bool:
        """Whether a step comes with an estimate of its error."""
        return self.b_error is not None

    @property
    def matrix(self) -> np.ndarray:
        """The coefficients `a` as a square matrix, with zeros above the diagonal."""
        return self.dense_matrix[: self.num_stages, : self.num_stages]

    @property
    def dense_matrix(self) -> np.ndarray:
        """The same with the rows of `a_dense`."""
        rows = (*self.a, *self.a_dense)
        a = np.diag([0.0, *[self.gamma] * len(rows)])
        for i, row in enumerate(rows, 1):
            a[i, :i] = row
        return a

    @functools.cached_property
    def stability_limit(self) -> float:
        """The largest `z` so that steps with `dt * lambda` from `-z` to 0 are stable, for an explicit method.

        A step multiplies the solution of `dy/dt = lambda y` by the stability function, `1 + sum_j z^j b A^(j - 1) 1`.
        """
        coefficients, powers = [1.0], np.ones(self.num_stages)
        for _ in range(self.num_stages):
            coefficients.append(float(np.array(self.b, float) @ powers))
            powers = self.matrix @ powers
        z = np.linspace(0, 2 * self.num_stages**2, 200_001)
        # No polynomial of this degree with the right value and slope at 0 is stable as far as the end of the range.
        grows = np.abs(np.polynomial.Polynomial(coefficients)(-z)) > 1 + 1e-9
        return float(z[np.argmax(grows)])

    @functools.cached_property
    def guesses(self) -> tuple[tuple[float, ...], ...]:
        """For every stage after the first, the weights of the stages before it in a guess of its rate.

        They are the smallest weights that are right if the rate is linear in time, and that give a bounded guess
        however stiff the problem is. The latter needs weights that are orthogonal to the vector `w` with `A w = 0`,
        because the rate at the start is not bounded.
        """
        a, c = self.matrix, np.array(self.c, float)
        null = np.array([1, *np.linalg.solve(a[1:, 1:], -a[1:, 0])])
        rows = []
        for i in range(1, self.num_stages):
            conditions = np.stack([np.ones(i), c[:i], null[:i]])[: min(i, 3)]
            values = np.array([1, c[i], 0])[: min(i, 3)]
            rows.append(tuple(np.linalg.lstsq(conditions, values, rcond=None)[0].tolist()))
        return tuple(rows)

    @functools.cached_property
    def b_bernstein(self) -> tuple[tuple[float, ...], ...]:
        """The rows of `b_dense` in the Bernstein basis, `comb(q, j) theta^j (1 - theta)^(q - j)`, j = 1 to q.

        Near the end of a step, terms with powers of theta cancel, and float32 loses two digits. In this basis it does
        not.
        """
        q = len(self.b_dense[0])
        to_bernstein = [[comb(j, m) / comb(q, m) if m <= j else 0 for j in range(1, q + 1)] for m in range(1, q + 1)]
        return tuple(map(tuple, (np.array(self.b_dense) @ np.array(to_bernstein)).tolist()))

    def __post_init__(self) -> None:
        self._check_shapes()
        a = self.matrix
        b, b_dense = np.array(self.b, float), np.array(self.b_dense, float)
        if self.symplectic:
            self._check_halves(a, b)
            return
        self._check_sum("`b` must sum to 1", b, 1)
        self._check_sum("the rows of `a` must sum to `c`", a, np.array(self.c, float))
        self._check_order("`b`", b, a, self.order)
        if self.embedded:
            assert self.error_order is not None  # `_check_shapes` makes sure
            b_error = np.array(self.b_error, float)
            self._check_sum("`b_error` must sum to 0", b_error, 0)
            self._require(bool(b_error.any()), "`b_error` must not vanish", self.b_error)
            self._check_order("`b - b_error`", b - b_error, a, self.error_order - 1)
            self._check_order("`b` of this `error_order`", b, a, self.error_order - 1)
        at_end = np.append(b, np.zeros(len(self.a_dense)))
        self._check_sum("the rows of `b_dense` must sum to `b`, and to 0 for further stages", b_dense, at_end)
        if self.a_dense:
            further = self.dense_matrix[self.num_stages :]
            self._check_sum("the rows of `a_dense` must sum to `c_dense`", further, np.array(self.c_dense, float))
        self._check_order("`b_dense`", b_dense, self.dense_matrix, self.dense_order)

    def _check_halves(self, a: np.ndarray, b: np.ndarray) -> None:
        """Checks a symplectic method: its order, and that a step backward undoes a step."""
        masks = np.array([[half == of for half in self.halves] for of in (0, 1)], float)
        self._check_sum("`b` must sum to 1 for each half", masks * b, np.ones(2))
        self._check_sum("the rows of `a` must sum to `c` for the positions", a * masks[0], np.array(self.c, float))
        trees = rooted_trees(self.order)
        for colour, phi in enumerate(alternating_weights(a, masks, trees)):
            terms = phi * (b * masks[colour])
            for tree, actual, size in zip(trees, terms.sum(axis=1), np.abs(terms).sum(axis=1), strict=True):
                holds = _equal(actual, 1 / tree.density, size)
                condition = f"to be of order {self.order}, `b` must satisfy the order condition of the rooted tree"
                self._require(bool(holds), f"{condition} {tree.brackets}", f"{actual} instead of {1 / tree.density}")
        palindrome = self.b == self.b[::-1] and self.halves == self.halves[::-1]
        self._require(palindrome, "a symmetric method has the same `b` and `halves` from both ends", self.b)
        explicit = all(row == self.b[: len(row)] for row in self.a)
        self._require(explicit, "each stage must start where the stage before it ended, so `a` repeats `b`", self.a)

    def _require(self, holds: bool, condition: str, received: object) -> None:
        if not holds:
            raise ValueError(f"Butcher tableau '{self.name}': {condition}. Received: {received}")

    def _check_shapes(self) -> None:
        stages = self.num_stages
        rows = [len(row) for row in self.a]
        holds = rows == list(range(1, stages))
        self._require(holds, f"`a` must have rows of length 1 to {stages - 1}", rows)
        for field in ("c", "b_error"):
            length = stages if getattr(self, field) is None else len(getattr(self, field))
            self._require(length == stages, f"`{field}` must be as long as `b`, {stages}", length)
        holds = not self.symplectic or (len(self.halves) == stages and set(self.halves) == {0, 1})
        self._require(holds, f"`halves` must hold {stages} numbers, 0 and 1", self.halves)
        further = [len(row) for row in self.a_dense]
        holds = further == list(range(stages, stages + len(further)))
        self._require(holds, f"`a_dense` must have rows of length {stages}, {stages + 1} and so on", further)
        self._require(len(self.c_dense) == len(further), "`c_dense` must be as long as `a_dense`", self.c_dense)
        self._require(not (further and self.implicit), "an implicit method has no `a_dense`", further)
        length = stages + len(further)
        self._require(len(self.b_dense) == length, f"`b_dense` must have {length} rows", len(self.b_dense))
        columns = [len(row) for row in self.b_dense]
        holds = len(set(columns)) == 1 and columns[0] >= self.dense_order
        self._require(holds, "`b_dense` must have equal rows, at least `dense_order` long", columns)
        holds = self.embedded == (self.error_order is not None)
        received = f"b_error={self.b_error}, error_order={self.error_order}"
        self._require(holds, "`b_error` and `error_order` come together: give both or none of them", received)
        for field, least in (("order", 1), ("dense_order", 1), ("error_order", 2)):
            claim = getattr(self, field)
            # No explicit method has a higher order than its number of stages, and there would be millions of trees.
            holds = claim is None or least <= claim < least + stages
            self._require(holds, f"`{field}` must be {least} to {least + stages - 1}", claim)

    def _check_sum(self, condition: str, terms: np.ndarray, expected: np.ndarray | float) -> None:
        total = terms.sum(axis=-1)
        holds = _equal(total, expected, np.abs(terms).sum(axis=-1)).all()
        self._require(bool(holds), condition, f"{total} instead of {expected}")

    def _check_order(self, field: str, weights: np.ndarray, a: np.ndarray, order: int) -> None:
        """Checks the order conditions of weights, or of weights that are rows of coefficients of powers of theta.

        The sum of `weights_i Phi_i` must be `1 / gamma`, or `theta**tree.order / gamma`.
        """
        trees = rooted_trees(order)
        phi = elementary_weights(a, trees)
        actual = phi @ weights
        expected = np.array([1 / tree.density for tree in trees])
        if weights.ndim == 2:
            powers = np.arange(1, weights.shape[1] + 1)
            orders = np.array([tree.order for tree in trees])
            expected = np.where(orders[:, None] == powers, expected[:, None], 0)
        holds = _equal(actual, expected, np.abs(phi) @ np.abs(weights))
        for i, tree in enumerate(trees):
            if not holds[i].all():
                condition = f"to be of order {order}, {field} must satisfy the order condition of "
                received = f"{actual[i]} instead of {expected[i]}"
                self._require(False, f"{condition}the rooted tree {tree.brackets}", received)
