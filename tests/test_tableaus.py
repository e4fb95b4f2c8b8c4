"""Every tableau is right, and a wrong one does not get past its own construction."""

import dataclasses

import numpy as np
import pytest
from scipy.integrate import RK23, RK45

from keras_node.solvers import explicit_tableaus, implicit_tableaus, symplectic_tableaus
from keras_node.solvers.rooted_trees import rooted_trees
from keras_node.solvers.tableaus import TABLEAUS, ButcherTableau

IMPLICIT = [name for name, tableau in TABLEAUS.items() if tableau.implicit]
# Those of symplectic methods are tested in test_symplectic.py: they are not for the scalar field here.
ordinary_tableaus = {name: tableau for name, tableau in TABLEAUS.items() if not tableau.symplectic}
every_tableau = pytest.mark.parametrize("tableau", ordinary_tableaus.values(), ids=ordinary_tableaus)
embedded_tableaus = {name: tableau for name, tableau in TABLEAUS.items() if tableau.embedded}
every_embedded_tableau = pytest.mark.parametrize("tableau", embedded_tableaus.values(), ids=embedded_tableaus)


def nudged(numbers, index=-1, by=1e-9):
    """The same tuple with one number a little off."""
    numbers = list(numbers)
    numbers[index] += by
    return tuple(numbers)


def nudged_row(rows, index=-1, by=1e-9):
    rows = list(rows)
    rows[index] = nudged(rows[index], by=by)
    return tuple(rows)


def square_a(tableau):
    a = np.zeros((tableau.num_stages, tableau.num_stages))
    for i, row in enumerate(tableau.a, 1):
        a[i, :i] = row
        a[i, i] = tableau.gamma
    return a


def field(t, y):
    return -2 * t * y**2


def solution(t):
    return 1 / (1 + t**2)


# Several, since a single local error crosses zero now and then and shows no clean power there.
START = np.linspace(0, 1, 9)


def moved_by(weights, k, dt):
    return solution(START) + dt * np.tensordot(weights, k, axes=1)


def stages(tableau, dt):
    k = np.zeros((tableau.num_stages, len(START)))
    # An implicit stage depends on itself. The steps here are short, so that this converges to the last digit.
    for _ in range(40 if tableau.implicit else 1):
        for i, (a, c) in enumerate(zip(square_a(tableau), tableau.c, strict=True)):
            k[i] = field(START + c * dt, moved_by(a, k, dt))
    return k


def dense_stages(tableau, dt):
    k = list(stages(tableau, dt))
    for a, c in zip(tableau.a_dense, tableau.c_dense, strict=True):
        k.append(field(START + c * dt, moved_by(a, k, dt)))
    return np.array(k)


def fitted_power(error_of_step):
    """The `p` in `error ~ dt**p`, from the smallest errors that stand clear of rounding."""
    steps = 2.0 ** -np.arange(0, 16, 0.25)
    errors = np.array([np.abs(error_of_step(dt)).max() for dt in steps])
    smallest = np.flatnonzero(errors > 1e-13)[-4:]
    return np.polyfit(np.log(steps[smallest]), np.log(errors[smallest]), deg=1)[0]


def test_every_constant_is_listed_under_its_name():
    everything = {**vars(explicit_tableaus), **vars(implicit_tableaus), **vars(symplectic_tableaus)}
    constants = [value for value in everything.values() if isinstance(value, ButcherTableau)]
    assert list(TABLEAUS.values()) == constants
    for name, tableau in TABLEAUS.items():
        assert tableau.name == name
        assert everything[name.upper()] is tableau


def test_the_promised_methods_are_there():
    promised = "euler midpoint heun ralston rk4 rk38 bosh3 dopri5 tsit5 dopri8 trbdf2 kvaerno3 esdirk43 esdirk54"
    assert {*promised.split(), "leapfrog", "yoshida4"} <= set(TABLEAUS)


def test_these_methods_estimate_their_error():
    assert list(embedded_tableaus) == ["heun", "bosh3", "dopri5", "tsit5", "dopri8", *IMPLICIT]


def test_these_methods_are_first_same_as_last():
    assert [t.name for t in TABLEAUS.values() if t.fsal] == ["bosh3", "dopri5", "tsit5", *IMPLICIT]


def test_the_shared_stage_counts_as_a_stage():
    expected = {"euler": 1, "rk4": 4, "bosh3": 4, "dopri5": 7, "tsit5": 7, "dopri8": 13}
    assert {name: TABLEAUS[name].num_stages for name in expected} == expected


@pytest.mark.parametrize(("name", "reference"), [("bosh3", RK23), ("dopri5", RK45)])
def test_coefficients_agree_with_scipy(name, reference):
    # SciPy leaves the last stage out of A, B and C, and its E is the other way round.
    tableau = TABLEAUS[name]
    close = {"rtol": 1e-15, "atol": 1e-16}
    rows, columns = reference.A.shape
    np.testing.assert_allclose(square_a(tableau)[:rows, :columns], reference.A, **close)
    np.testing.assert_allclose(tableau.b[:-1], reference.B, **close)
    np.testing.assert_allclose(tableau.c[:-1], reference.C, **close)
    np.testing.assert_allclose(tableau.b_error, -reference.E, **close)
    np.testing.assert_allclose(tableau.b_dense, reference.P, **close)


def test_rooted_trees_are_as_many_as_counted_by_cayley():
    orders = [tree.order for tree in rooted_trees(8)]
    assert np.bincount(orders).tolist() == [0, 1, 1, 2, 4, 9, 20, 48, 115]


def test_densities_are_those_of_the_textbook():
    density = {tree.brackets: tree.density for tree in rooted_trees(4)}
    assert density == {
        "[]": 1,
        "[[]]": 2,
        "[[][]]": 3,
        "[[[]]]": 6,
        "[[][][]]": 4,
        "[[][[]]]": 8,
        "[[[][]]]": 12,
        "[[[[]]]]": 24,
    }


@every_tableau
def test_step_converges_at_its_order(tableau):
    def error(dt):
        return moved_by(tableau.b, stages(tableau, dt), dt) - solution(START + dt)

    assert fitted_power(error) == pytest.approx(tableau.order + 1, abs=0.25)


@every_embedded_tableau
def test_embedded_method_converges_at_its_order(tableau):
    weights = np.subtract(tableau.b, tableau.b_error)

    def error(dt):
        return moved_by(weights, stages(tableau, dt), dt) - solution(START + dt)

    # That of trbdf2 is of a higher order than the method, so the error estimate is that of the method.
    assert fitted_power(error) == pytest.approx(tableau.error_order + (tableau.name == "trbdf2"), abs=0.25)


@every_embedded_tableau
def test_error_estimate_shrinks_at_its_order(tableau):
    def estimate(dt):
        return dt * np.tensordot(tableau.b_error, stages(tableau, dt), axes=1)

    assert fitted_power(estimate) == pytest.approx(tableau.error_order, abs=0.25)


@every_tableau
@pytest.mark.parametrize("theta", [np.sqrt(2) - 1, 1 / np.sqrt(2)])
def test_dense_output_converges_at_its_order(tableau, theta):
    weights = tableau.b_dense @ theta ** np.arange(1, len(tableau.b_dense[0]) + 1)

    def error(dt):
        return moved_by(weights, dense_stages(tableau, dt), dt) - solution(START + theta * dt)

    assert fitted_power(error) == pytest.approx(tableau.dense_order + 1, abs=0.25)


@every_tableau
def test_dense_output_starts_along_the_first_stage_and_ends_at_the_step(tableau):
    b_dense = np.array(tableau.b_dense)
    if not tableau.implicit:  # that slope is not bounded in a stiff problem
        np.testing.assert_array_equal(b_dense[:, 0], np.eye(len(b_dense))[0])
    np.testing.assert_allclose(b_dense.sum(axis=1), [*tableau.b, *[0] * len(tableau.a_dense)], atol=1e-12)


@pytest.mark.parametrize(("name", "last"), [("bosh3", -1), ("dopri5", -1), ("tsit5", -1), ("dopri8", 13)])
def test_dense_output_has_no_kink_where_a_stage_is_the_next_first(name, last):
    b_dense = np.array(TABLEAUS[name].b_dense)
    slopes_at_end = b_dense @ np.arange(1, b_dense.shape[1] + 1)
    np.testing.assert_allclose(slopes_at_end, np.eye(len(b_dense))[last], atol=1e-11)


def test_further_stages_check_themselves():
    tableau = TABLEAUS["dopri8"]
    with pytest.raises(ValueError, match="the rows of `a_dense` must sum to `c_dense`"):
        dataclasses.replace(tableau, a_dense=nudged_row(tableau.a_dense))
    with pytest.raises(ValueError, match="`a_dense` must have rows of length 13, 14 and so on"):
        dataclasses.replace(tableau, a_dense=tableau.a_dense[1:])
    with pytest.raises(ValueError, match="`c_dense` must be as long"):
        dataclasses.replace(tableau, c_dense=tableau.c_dense[1:])
    with pytest.raises(ValueError, match=r"`b_dense` must have 18 rows\. Received: 17"):
        dataclasses.replace(tableau, b_dense=tableau.b_dense[:-1])
    trbdf2 = TABLEAUS["trbdf2"]
    with pytest.raises(ValueError, match="an implicit method has no `a_dense`"):
        dataclasses.replace(trbdf2, a_dense=((1, 0, 0),), c_dense=(1,), b_dense=(*trbdf2.b_dense, (0, 0)))


@every_tableau
def test_a_wrong_weight_raises(tableau):
    with pytest.raises(ValueError, match=f"'{tableau.name}': `b` must sum to 1.*Received"):
        dataclasses.replace(tableau, b=nudged(tableau.b))


@every_tableau
def test_a_wrong_time_raises(tableau):
    with pytest.raises(ValueError, match=f"'{tableau.name}': the rows of `a` must sum to `c`"):
        dataclasses.replace(tableau, c=nudged(tableau.c))


@pytest.mark.parametrize("row", range(3))
def test_a_wrong_stage_coefficient_raises(row):
    tableau = TABLEAUS["rk4"]
    with pytest.raises(ValueError, match="'rk4': the rows of `a` must sum to `c`"):
        dataclasses.replace(tableau, a=nudged_row(tableau.a, row))


def test_stage_coefficients_that_are_wrong_but_sum_to_the_time_raise():
    tableau = TABLEAUS["rk4"]
    swapped = (*tableau.a[:2], (0, 1, 0))
    with pytest.raises(ValueError, match=r"'rk4'.*order 4, `b` must.*tree \[\[\[\[\]\]\]\]"):
        dataclasses.replace(tableau, a=swapped)


def test_weights_that_are_wrong_but_sum_to_one_raise():
    with pytest.raises(ValueError, match=r"'heun'.*order 2, `b` must.*the rooted tree \[\[\]\]"):
        dataclasses.replace(TABLEAUS["heun"], b=(1 / 4, 3 / 4))


@every_embedded_tableau
def test_a_wrong_error_weight_raises(tableau):
    with pytest.raises(ValueError, match=f"'{tableau.name}': `b_error` must sum to 0"):
        dataclasses.replace(tableau, b_error=nudged(tableau.b_error))


def test_error_weights_that_are_wrong_but_sum_to_zero_raise():
    tableau = TABLEAUS["bosh3"]
    b_error = nudged(nudged(tableau.b_error), 0, by=-1e-9)
    with pytest.raises(ValueError, match=r"'bosh3'.*order 2, `b - b_error` must satisfy"):
        dataclasses.replace(tableau, b_error=b_error)


def test_an_error_estimate_that_sees_nothing_raises():
    with pytest.raises(ValueError, match="'heun': `b_error` must not vanish"):
        dataclasses.replace(TABLEAUS["heun"], b_error=(0, 0))


@every_tableau
def test_a_wrong_dense_coefficient_raises(tableau):
    with pytest.raises(ValueError, match=f"'{tableau.name}': the rows of `b_dense` must sum"):
        dataclasses.replace(tableau, b_dense=nudged_row(tableau.b_dense))


def test_dense_coefficients_that_are_wrong_inside_the_step_raise():
    with pytest.raises(ValueError, match=r"'heun'.*order 2, `b_dense` must satisfy"):
        dataclasses.replace(TABLEAUS["heun"], b_dense=((1, -1 / 2), (1 / 2, 0)))


@every_tableau
@pytest.mark.parametrize("claim", ["order", "dense_order"])
def test_an_order_claimed_too_high_raises(tableau, claim):
    with pytest.raises(ValueError, match=f"'{tableau.name}'.*order"):
        dataclasses.replace(tableau, **{claim: getattr(tableau, claim) + 1})


@every_embedded_tableau
def test_an_error_order_claimed_too_high_raises(tableau):
    with pytest.raises(ValueError, match=f"'{tableau.name}'.*`b.* must satisfy"):
        dataclasses.replace(tableau, error_order=tableau.error_order + 1)


@pytest.mark.parametrize("claim", ["order", "dense_order", "error_order"])
@pytest.mark.parametrize("order", [0, 99])
def test_an_order_that_no_explicit_method_has_raises_at_once(claim, order):
    with pytest.raises(ValueError, match=f"'dopri5'.*{claim}.*Received"):
        dataclasses.replace(TABLEAUS["dopri5"], **{claim: order})


@pytest.mark.parametrize("coefficients", ["b", "c", "b_error"])
def test_a_coefficient_that_is_not_a_number_raises(coefficients):
    tableau = TABLEAUS["tsit5"]
    numbers = nudged(getattr(tableau, coefficients), by=float("nan"))
    with pytest.raises(ValueError, match="'tsit5'"):
        dataclasses.replace(tableau, **{coefficients: numbers})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": ((1 / 2,), (0, 1 / 2), (0, 1))},
            r"`a` must have rows of length 1 to 3.*\[1, 2, 2\]",
        ),
        ({"c": (0, 1 / 2, 1)}, "`c` must be as long as `b`, 4. Received: 3"),
        ({"b_dense": ((1,),)}, "`b_dense` must have 4 rows. Received: 1"),
        ({"b_dense": ((1,),) * 4}, r"`b_dense` must have equal rows.*Received: \[1, 1, 1, 1\]"),
        (
            {"b_error": (1, -1), "error_order": 2},
            "`b_error` must be as long as `b`, 4. Received: 2",
        ),
        ({"b_error": (1, -1, 0, 0)}, "`b_error` and `error_order` come together"),
        ({"error_order": 3}, "`b_error` and `error_order` come together"),
    ],
)
def test_a_wrong_shape_raises(change, message):
    with pytest.raises(ValueError, match=f"'rk4': {message}"):
        dataclasses.replace(TABLEAUS["rk4"], **change)


def test_a_tableau_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLEAUS["euler"].order = 2
