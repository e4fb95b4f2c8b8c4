"""The symplectic methods, for systems of positions and velocities.

Each is a series of drifts, in which the positions move at the rate of the velocities, and kicks, in which the
velocities move at the rate of the positions.
"""

from collections.abc import Sequence

from keras_node.solvers.butcher_tableau import ButcherTableau


def _composed(name: str, order: int, substeps: Sequence[float]) -> ButcherTableau:
    """Leapfrog steps one after the other, of these lengths as parts of a step. Drifts that meet are one drift."""
    b = [substeps[0] / 2]
    for substep, following in zip(substeps, [*substeps[1:], 0], strict=True):
        b += [substep, (substep + following) / 2]
    halves = tuple(i % 2 for i in range(len(b)))
    drifts = [weight if half == 0 else 0 for weight, half in zip(b, halves, strict=True)]
    return ButcherTableau(
        name=name,
        order=order,
        a=tuple(tuple(b[:i]) for i in range(1, len(b))),
        b=tuple(b),
        c=tuple(sum(drifts[:i]) for i in range(len(b))),
        # A step ends at every time of a solve, so this straight line is read at its ends only.
        b_dense=tuple((weight,) for weight in b),
        dense_order=1,
        halves=halves,
    )


# Verlet (1967), "Computer experiments on classical fluids I", Phys. Rev. 159: half a drift, a kick, half a drift.
LEAPFROG = _composed("leapfrog", order=2, substeps=[1])

# Yoshida (1990), "Construction of higher order symplectic integrators", Phys. Lett. A 150, equation 2.11.
_OUTER = 1 / (2 - 2 ** (1 / 3))
YOSHIDA4 = _composed("yoshida4", order=4, substeps=[_OUTER, 1 - 2 * _OUTER, _OUTER])
