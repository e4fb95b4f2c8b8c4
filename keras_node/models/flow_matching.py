"""Flow matching: the loss that trains the field of a flow without a solve."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node.models.assignment import assignment
from keras_node.signatures import FieldCall, like_state

_OBJECTIVES = ("likelihood", "flow_matching")
_COUPLINGS = ("independent", "optimal_transport")


class FlowMatching(keras.layers.Layer):
    """Computes the loss of flow matching of each sample.

    `loss = ||f(t, x_t, condition) - (x - z) / t1||^2` with `x_t = (1 - t / t1) z + (t / t1) x`

    It is a layer so that the field is called inside a layer: Keras then tells all layers in it that they are in
    training, and forgets the losses that they added in the step before.

    Args:
        vector_field: the field `f`.
        t1: time of the data.
        coupling: `"independent"` or `"optimal_transport"`.
        seed_generator: the `keras.random.SeedGenerator` for the noise and the times.
    """

    def __init__(
        self,
        vector_field: keras.Layer | Callable,
        t1: float,
        coupling: str | None,
        seed_generator: keras.random.SeedGenerator,
    ) -> None:
        super().__init__(autocast=False, name="flow_matching")
        self.vector_field = vector_field
        self.t1 = t1
        self.coupling = coupling
        self.seed_generator = seed_generator

    def call(self, x: tf.Tensor, condition: tf.Tensor | None = None, training: bool | None = None) -> tf.Tensor:
        if condition is not None and self.coupling == "optimal_transport":
            raise ValueError(
                "Optimal transport pairs noise and data without regard to the condition. Given a condition, the noise "
                'would not be normal any more, and the density would be wrong: use `coupling="independent"`. '
                f"Received: a condition of shape {tuple(condition.shape)}"
            )
        z = tf.random.stateless_normal(tf.shape(x), self._seed(), dtype=x.dtype)
        if self.coupling == "optimal_transport":
            z = tf.gather(z, assignment(x, z))
        share = tf.random.stateless_uniform((tf.shape(x)[0], 1), self._seed(), dtype=x.dtype)
        x_t = (1 - share) * z + share * x
        velocity = FieldCall(self.vector_field)(self.t1 * share, x_t, condition, training)
        velocity = like_state(velocity, x, self.vector_field)
        return tf.reduce_sum((velocity - (x - z) / self.t1) ** 2, axis=1)

    def _seed(self) -> tf.Tensor:
        """Returns a seed of this replica, because the generators of all replicas give the same ones."""
        replica = tf.distribute.get_replica_context()
        index = 0 if replica is None else replica.replica_id_in_sync_group
        # The second number counts the draws, so the replicas must differ in the first one.
        return tf.cast(self.seed_generator.next(), tf.int32) + tf.stack([index, 0])


def checked_coupling(
    objective: str, coupling: str | None, kinetic_energy: float, jacobian_norm: float, steer: float
) -> str | None:
    """Returns the coupling of an objective, and raises if the options of a flow do not go together."""
    if objective not in _OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(_OBJECTIVES)}. Received: objective={objective!r}")
    if objective == "likelihood":
        if coupling is not None:
            raise ValueError(
                "Training by likelihood pairs no noise with the data: leave `coupling` out, or pass "
                f'`objective="flow_matching"`. Received: objective={objective!r}, coupling={coupling!r}'
            )
        return None
    coupling = "independent" if coupling is None else coupling
    if coupling not in _COUPLINGS:
        raise ValueError(f"`coupling` must be one of {', '.join(_COUPLINGS)}. Received: coupling={coupling!r}")
    if kinetic_energy or jacobian_norm or steer:
        raise ValueError(
            "Flow matching trains without a solve, so there are no paths along which energies could be integrated, and "
            "no end to draw: leave out `kinetic_energy`, `jacobian_norm` and `steer`. "
            f"Received: kinetic_energy={kinetic_energy}, jacobian_norm={jacobian_norm}, steer={steer}"
        )
    return coupling


def refuse_weights(coupling: str | None, sample_weight: Any) -> None:
    """Raises for weights of samples whose noise was chosen for them."""
    if coupling == "optimal_transport" and sample_weight is not None:
        raise ValueError(
            "Optimal transport pairs noise and data without regard to the weights. The weighted noise would not be "
            'normal any more, and the density would be wrong: use `coupling="independent"`, or leave out '
            f"`sample_weight`. Received: sample_weight={sample_weight!r}"
        )
