"""Gradients: one file for each way to differentiate a solve. You call a gradient with a `Problem`."""

from typing import Any, TypeAlias

import keras

from keras_node.arguments import one_of
from keras_node.gradients.backsolve import BacksolveAdjoint
from keras_node.gradients.checkpointed import CheckpointedAdjoint
from keras_node.gradients.direct import DirectGradient

Gradient: TypeAlias = BacksolveAdjoint | CheckpointedAdjoint | DirectGradient

GRADIENTS: dict[str, type[Gradient]] = {
    "backsolve": BacksolveAdjoint,
    "checkpointed": CheckpointedAdjoint,
    "direct": DirectGradient,
}


def get(identifier: Gradient | str | dict[str, Any]) -> Gradient:
    """Returns a gradient from an object, a name or a config.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an `identifier` of another type.
    """
    if isinstance(identifier, Gradient):
        return identifier
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str):
        return GRADIENTS[one_of("gradient", identifier, GRADIENTS)]()
    raise TypeError(
        f"`gradient` must be one of {', '.join(GRADIENTS)}, or an object such as `keras_node.BacksolveAdjoint()`. "
        f"Received: gradient={identifier!r} (of type {type(identifier).__name__})"
    )
