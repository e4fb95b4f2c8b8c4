"""Ordinary backpropagation through the steps of the solver."""

from typing import Any

import keras

from keras_node.solve import Problem, Trajectory, add_gradient_at_start, solve


@keras.saving.register_keras_serializable(package="keras_node")
class DirectGradient:
    """Computes the gradient by backpropagation through the operations of the solver.

    This is the gradient of the discrete solution, exact up to rounding. Step sizes count as constants. Memory grows
    with the number of attempted steps. Under XLA the amount of memory must be known in advance, and an adaptive solver
    reserves it for `max_steps`: choose a small `max_steps`, or constant steps with `num_steps`.

    With an implicit method, a solve can be differentiated twice. It then computes the Jacobian at every stage, which
    `"checkpointed"` does in the gradient only.

    Example:
        >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=keras_node.DirectGradient())
        >>> layer(keras.ops.ones((3, 2))).shape
        TensorShape([3, 2])

    Reference:

        - Gholami, Keutzer & Biros (2019), "ANODE: Unconditionally Accurate Memory-Efficient Gradients for Neural ODEs",
          arXiv:1902.10298, on the gradient of the discrete solution.
    """

    def __call__(self, problem: Problem) -> Trajectory:
        """Solves the problem with this gradient. The layers and `keras_node.odeint` call it."""
        trajectory, _ = solve(problem, num_derivatives=2)
        return add_gradient_at_start(problem, trajectory)

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DirectGradient":
        return cls(**config)
