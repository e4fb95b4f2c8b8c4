"""Rooted trees. Each one stands for a condition that a Runge-Kutta method of some order must satisfy.

Reference: Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", II.2.
"""

import functools
from typing import NamedTuple

import numpy as np


class RootedTree(NamedTuple):
    """A tree that you get by attaching the tree `branch` to the root of the tree `trunk`.

    Attributes:
        order: the number of nodes.
        density: gamma in Hairer, Norsett & Wanner.
        trunk, branch: the indices of these two smaller trees, or 0 for the tree with a single node.
        brackets: the tree as nested brackets, such as `[[][]]`.
    """

    order: int
    density: int
    trunk: int
    branch: int
    brackets: str


@functools.cache
def rooted_trees(max_order: int) -> tuple[RootedTree, ...]:
    """All rooted trees with at most `max_order` nodes. Trees with fewer nodes come first."""
    if max_order == 1:
        return (RootedTree(order=1, density=1, trunk=0, branch=0, brackets="[]"),)
    smaller = rooted_trees(max_order - 1)
    grafted = (
        RootedTree(
            order=max_order,
            density=max_order * trunk.density // trunk.order * branch.density,
            trunk=i,
            branch=j,
            brackets=trunk.brackets[:-1] + branch.brackets + "]",
        )
        for i, trunk in enumerate(smaller)
        for j, branch in enumerate(smaller)
        # Branches are attached in ascending order, so that every tree is made only once.
        if trunk.order + branch.order == max_order and j >= trunk.branch
    )
    return (*smaller, *grafted)


def elementary_weights(a: np.ndarray, trees: tuple[RootedTree, ...]) -> np.ndarray:
    """Phi in Hairer, Norsett & Wanner, for every tree and stage: shape `(trees, stages)`."""
    weights = np.ones((len(trees), len(a)))
    for i, tree in enumerate(trees[1:], 1):
        weights[i] = weights[tree.trunk] * (a @ weights[tree.branch])
    return weights


def alternating_weights(a: np.ndarray, masks: np.ndarray, trees: tuple[RootedTree, ...]) -> np.ndarray:
    """The same for trees whose nodes have two colours, with every edge between the two: `(2, trees, stages)`.

    The first axis is the colour of the root. `masks`, `(2, stages)`, marks the stages of each colour. These are the
    trees of a system of two halves, each of which changes at a rate that depends on the other half only.

    Reference: Hairer, Lubich & Wanner (2006), "Geometric Numerical Integration", III.2.
    """
    weights = np.ones((2, len(trees), len(a)))
    for i, tree in enumerate(trees[1:], 1):
        for colour in (0, 1):
            branch = masks[1 - colour] * weights[1 - colour, tree.branch]
            weights[colour, i] = weights[colour, tree.trunk] * (a @ branch)
    return weights
