"""Butcher tableaus of the explicit Runge-Kutta methods: data that checks itself.

A step from `(t, y)` over `dt`, in the notation of Hairer, Norsett & Wanner (HNW), II.1 and II.6:

    k_i             = f(t + c_i dt, y + dt sum_j a_ij k_j)
    y1              = y + dt sum_i b_i k_i
    error           = dt sum_i b_error_i k_i
    y(t + theta dt) = y + dt sum_i b_i(theta) k_i,    b_i(theta) = sum_j b_dense_ij theta^j

The dense output uses only the stages of the step, so it needs no further evaluation of the field.

To add a method, add one constant. `TABLEAUS` finds it, and a wrong coefficient raises an error at import.

References:
    Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", 2nd edition:
    II.2 for rooted trees and order conditions, II.6 for the order conditions of dense output.
    The source of each method is above its constant.
"""

import functools
from dataclasses import dataclass
from math import comb

import numpy as np

from keras_node.solvers.rooted_trees import elementary_weights, rooted_trees


def _equal(actual: np.ndarray, expected: np.ndarray | float, size: np.ndarray) -> np.ndarray:
    """Whether values are equal up to rounding. `size` is the sum of the magnitudes of the terms of `actual`."""
    return np.abs(actual - expected) <= 1e-13 * (1 + size)


@dataclass(frozen=True, kw_only=True)
class ButcherTableau:
    """Coefficients of an explicit Runge-Kutta method, its error estimate and its dense output.

    All coefficients are tuples of Python numbers. The constructor checks their shapes, the row sums
    and every order condition up to the given orders.

    Args:
        name: String. The name by which a user selects the method.
        order: Integer. Order of the step: its local error is `O(dt**(order + 1))`.
        a: Tuple of `num_stages - 1` rows. The row of the second stage holds one number, and every
            next row holds one more.
        b: Tuple of `num_stages` numbers. Weights of the stages in the step.
        c: Tuple of `num_stages` numbers. Times of the stages, as fractions of the step.
        b_dense: Tuple of `num_stages` rows. Row `i` holds the coefficients of
            `theta, theta**2, ...` in the weight of stage `i` in the dense output.
        dense_order: Integer. Order of the dense output at every `theta`: its local error is
            `O(dt**(dense_order + 1))`.
        b_error: Tuple of `num_stages` numbers: `b` minus the weights of the embedded method.
            `None` for a method that has no embedded one.
        error_order: Integer. The order of the embedded method plus one, so that the error estimate
            behaves like `dt**error_order`. `None` without `b_error`.

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

    @property
    def num_stages(self) -> int:
        """Number of stages, including the one that a step shares with the next if the method is FSAL."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage, `f(t + dt, y1)`, is also the first stage of the next step."""
        return self.num_stages > 1 and self.c[-1] == 1 and (*self.a[-1], 0) == self.b

    @property
    def embedded(self) -> bool:
        """Whether a step comes with an estimate of its error."""
        return self.b_error is not None

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
        a = np.zeros((self.num_stages, self.num_stages))
        for i, row in enumerate(self.a, 1):
            a[i, :i] = row
        b, b_dense = np.array(self.b, float), np.array(self.b_dense, float)
        self._check_sum("`b` must sum to 1", b, 1)
        self._check_sum("the rows of `a` must sum to `c`", a, np.array(self.c, float))
        self._check_order("`b`", b, a, self.order)
        if self.embedded:
            assert self.error_order is not None  # `_check_shapes` makes sure
            b_error = np.array(self.b_error, float)
            self._check_sum("`b_error` must sum to 0", b_error, 0)
            self._require(bool(b_error.any()), "`b_error` must not vanish", self.b_error)
            self._check_order("`b - b_error`", b - b_error, a, self.error_order - 1)
        self._check_sum("the rows of `b_dense` must sum to `b`", b_dense, b)
        self._check_order("`b_dense`", b_dense, a, self.dense_order)

    def _require(self, holds: bool, condition: str, received: object) -> None:
        if not holds:
            raise ValueError(f"Butcher tableau '{self.name}': {condition}. Received: {received}")

    def _check_shapes(self) -> None:
        stages = self.num_stages
        rows = [len(row) for row in self.a]
        holds = rows == list(range(1, stages))
        self._require(holds, f"`a` must have rows of length 1 to {stages - 1}", rows)
        for field in ("c", "b_dense", "b_error"):
            length = stages if getattr(self, field) is None else len(getattr(self, field))
            self._require(length == stages, f"`{field}` must be as long as `b`, {stages}", length)
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


# fmt: off
# The coefficients have the same layout as in the publications.

# Euler (1768), "Institutionum calculi integralis", volume 1, section 650.
EULER = ButcherTableau(
    name="euler", order=1, a=(), b=(1,), c=(0,), b_dense=((1,),), dense_order=1,
)

# Runge (1895), "Über die numerische Auflösung von Differentialgleichungen", Math. Ann. 46.
MIDPOINT = ButcherTableau(
    name="midpoint", order=2,
    a=((1 / 2,),), b=(0, 1), c=(0, 1 / 2),
    b_dense=((1, -1), (0, 1)), dense_order=2,
)

# Heun (1900), "Neue Methoden zur approximativen Integration der Differentialgleichungen einer
# unabhängigen Veränderlichen", Z. Math. Phys. 45. The explicit trapezoidal rule with Euler's method
# embedded; not Heun's method of order 3.
HEUN = ButcherTableau(
    name="heun", order=2,
    a=((1,),), b=(1 / 2, 1 / 2), c=(0, 1),
    b_error=(-1 / 2, 1 / 2), error_order=2,
    b_dense=((1, -1 / 2), (0, 1 / 2)), dense_order=2,
)

# Ralston (1962), "Runge-Kutta methods with minimum error bounds", Math. Comp. 16.
RALSTON = ButcherTableau(
    name="ralston", order=2,
    a=((2 / 3,),), b=(1 / 4, 3 / 4), c=(0, 2 / 3),
    b_dense=((1, -3 / 4), (0, 3 / 4)), dense_order=2,
)

# Kutta (1901), "Beitrag zur näherungsweisen Integration totaler Differentialgleichungen",
# Z. Math. Phys. 46, for this method and the next. Its four stages have exactly one dense output of order 3.
RK4 = ButcherTableau(
    name="rk4", order=4,
    a=((1 / 2,), (0, 1 / 2), (0, 0, 1)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0, 1 / 2, 1 / 2, 1),
    b_dense=((1, -3 / 2, 2 / 3), (0, 1, -2 / 3), (0, 1, -2 / 3), (0, -1 / 2, 2 / 3)),
    dense_order=3,
)

# The 3/8 rule.
RK38 = ButcherTableau(
    name="rk38", order=4,
    a=((1 / 3,), (-1 / 3, 1), (1, -1, 1)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8), c=(0, 1 / 3, 2 / 3, 1),
    b_dense=((1, -15 / 8, 1), (0, 15 / 8, -3 / 2), (0, 3 / 8, 0), (0, -3 / 8, 1 / 2)),
    dense_order=3,
)

# Bogacki & Shampine (1989), "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2(4).
# The dense output is the cubic Hermite polynomial of the states at both ends and their rates of change.
BOSH3 = ButcherTableau(
    name="bosh3", order=3,
    a=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0), c=(0, 1 / 2, 3 / 4, 1),
    b_error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8), error_order=3,
    b_dense=((1, -4 / 3, 5 / 9), (0, 1, -2 / 3), (0, 4 / 3, -8 / 9), (0, -1, 1)), dense_order=3,
)

# Dormand & Prince (1980), "A family of embedded Runge-Kutta formulae", J. Comp. Appl. Math. 6(1),
# RK5(4)7M. Dense output: Shampine (1986), "Some practical Runge-Kutta formulas", Math. Comp. 46.
DOPRI5 = ButcherTableau(
    name="dopri5", order=5,
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    b_error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    error_order=5,
    b_dense=(
        (1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0, 0, 0, 0),
        (0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
    dense_order=4,
)

# Tsitouras (2011), "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
# assumption", Comput. Math. Appl. 62(2). The dense output is that of the paper, expanded in powers of theta.
TSIT5 = ButcherTableau(
    name="tsit5", order=5,
    a=(
        (161 / 1000,),
        (-0.0084806554923569885, 0.33548065549235699),
        (2.8971530571054934, -6.3594484899750748, 4.3622954328695814),
        (5.3258648284392566, -11.748883564062828, 7.4955393428898362, -0.092495066361755249),
        (5.86145544294642, -12.920969317847109, 8.1593678985761586, -0.071584973281400997,
         -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.47988965041449957, 1.3790085741037419, -3.2900695154360807,
         2.324710524099774),
    ),
    b=(
        0.09646076681806523, 1 / 100, 0.47988965041449957, 1.3790085741037419, -3.2900695154360807,
        2.324710524099774, 0,
    ),
    c=(0, 161 / 1000, 327 / 1000, 9 / 10, 0.98002554090450969, 1, 1),
    b_error=(
        0.0017800110522257714, 0.0008164344596567469, -0.007880878010261996, 0.14471100717326291,
        -0.58235716545255523, 0.45808210592918695, -1 / 66,
    ),
    error_order=5,
    b_dense=(
        (1, -2.7637061972748259, 2.9132554618219127, -1.0530884977290216),
        (0, 0.1317, -0.2234, 0.1017),
        (0, 3.9302962368947515, -5.9410338721315047, 2.4906272856512528),
        (0, -12.411077166933677, 30.338188630282322, -16.548102889244903),
        (0, 37.509313416511039, -88.178904894766401, 47.379521962819281),
        (0, -27.896526289197288, 65.091894674793672, -34.87065786149661),
        (0, 1.5, -4, 2.5),
    ),
    dense_order=4,
)

# Prince & Dormand (1981), "High order embedded Runge-Kutta formulae", J. Comp. Appl. Math. 7(1),
# RK8(7)13M. The dense output was made for this package. These stages have no continuous extension
# of order 6, even with f(t + dt, y1) as a fourteenth stage. This one has order 5 and degree 6 in
# theta. It begins with the slope k_1 and ends with the weights b. Among all such extensions it
# minimises the integral over theta of E6^2 + E7^2 / 4, where Ep^2 is the sum of
# ((sum_i b_i(theta) Phi_i - theta^p / gamma) / sigma)^2 over the trees of order p.
DOPRI8 = ButcherTableau(
    name="dopri8", order=8,
    a=(
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0, 3 / 32),
        (5 / 16, 0, -75 / 64, 75 / 64),
        (3 / 80, 0, 0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0, 0, 77736538 / 692538347, -28693883 / 1125000000,
         23124283 / 1800000000),
        (16016141 / 946692911, 0, 0, 61564180 / 158732637, 22789713 / 633445777,
         545815736 / 2771057229, -180193667 / 1043307555),
        (39632708 / 573591083, 0, 0, -433636366 / 683701615, -421739975 / 2616292301,
         100302831 / 723423059, 790204164 / 839813087, 800635310 / 3783071287),
        (246121993 / 1340847787, 0, 0, -37695042795 / 15268766246, -309121744 / 1061227803,
         -12992083 / 490766935, 6005943493 / 2108947869, 393006217 / 1396673457,
         123872331 / 1001029789),
        (-1028468189 / 846180014, 0, 0, 8478235783 / 508512852, 1311729495 / 1432422823,
         -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649,
         -45442868181 / 3398467696, 3065993473 / 597172653),
        (185892177 / 718116043, 0, 0, -3185094517 / 667107341, -477755414 / 1098053517,
         -703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563,
         -4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083),
        (403863854 / 491063109, 0, 0, -5068492393 / 434740067, -411421997 / 543043805,
         652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034,
         3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0),
    ),
    b=(
        14005451 / 335480064, 0, 0, 0, 0, -59238493 / 1068277825, 181606767 / 758867731,
        561292985 / 797845732, -1041891430 / 1371343529, 760417239 / 1151165299,
        118820643 / 751138087, -528747749 / 2220607170, 1 / 4,
    ),
    c=(
        0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821,
        13 / 20, 1201146811 / 1299019798, 1, 1,
    ),
    b_error=(
        14005451 / 335480064 - 13451932 / 455176623, 0, 0, 0, 0,
        -59238493 / 1068277825 + 808719846 / 976000145,
        181606767 / 758867731 - 1757004468 / 5645159321,
        561292985 / 797845732 - 656045339 / 265891186,
        -1041891430 / 1371343529 + 3867574721 / 1518517206,
        760417239 / 1151165299 - 465885868 / 322736535,
        118820643 / 751138087 - 53011238 / 667516719,
        -528747749 / 2220607170 - 2 / 45,
        1 / 4,
    ),
    error_order=8,
    b_dense=(
        (1, -6.983483168558604, 21.956095311330035, -34.39081482358729, 26.170459734611484,
         -7.710509562654096),
        *[(0, 0, 0, 0, 0, 0)] * 4,
        (0, -12.634116938667319, 86.55404864782726, -196.49485943423656, 185.67604040422611,
         -63.15656500776074),
        (0, 11.954276281599162, -55.109844175514375, 101.30199705155621, -83.99455478378246,
         26.087438433342626),
        (0, 4.726307726812888, -30.623901420585756, 74.72348173172686, -75.79556809325597,
         27.673190724705414),
        (0, 8.115073715051748, -58.11515686966945, 139.41660874247785, -139.45233580650378,
         49.27605060482918),
        (0, -5.383443681182538, 35.76512907010871, -83.37707533204086, 84.6280798727369,
         -30.972126898699926),
        (0, 0.17609219875480275, 1.0972524136461972, -8.227891751119397, 13.255293260440782,
         -6.14255863921226),
        (0, 0.5614589811854447, -11.988537126417828, 46.46015852054014, -61.684247247931424,
         26.413057333870807),
        (0, -0.5321651149955852, 10.464914149275199, -39.41160470531697, 51.19683265945836,
         -21.467976988421004),
    ),
    dense_order=5,
)
# fmt: on

TABLEAUS: dict[str, ButcherTableau] = {
    constant.name: constant for constant in list(globals().values()) if isinstance(constant, ButcherTableau)
}
