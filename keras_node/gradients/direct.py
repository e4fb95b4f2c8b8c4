"""Ordinary backpropagation through the steps of the solver."""

import keras

from keras_node.solve import Problem, Trajectory, leave_start, solve


@keras.saving.register_keras_serializable(package="keras_node")
class DirectGradient:
    """Backpropagates through the solver's own operations.

    The gradient is that of the discrete solution, exact to rounding, with the step sizes held constant. Memory
    grows with the number of attempted steps; under XLA, where it must be known beforehand, it is reserved for
    `max_steps` of an adaptive solver, so choose a small `max_steps` or a constant `num_steps` there.

    Example:
    >>> layer = keras_node.ODELayer(keras.layers.Dense(2), gradient=keras_node.DirectGradient())
    >>> layer(keras.ops.ones((3, 2))).shape
    TensorShape([3, 2])
    """

    def __call__(self, problem: Problem) -> Trajectory:
        trajectory, _ = solve(problem)
        return leave_start(problem, trajectory)

    def get_config(self) -> dict:
        return {}

    @classmethod
    def from_config(cls, config: dict) -> "DirectGradient":
        return cls(**config)
