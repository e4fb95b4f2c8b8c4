"""Vector-Jacobian products of nests."""

import tensorflow as tf

from keras_node import trees
from keras_node.trees import Nest


def vjp(tape: tf.GradientTape, outputs: Nest, inputs: Nest, cotangent: Nest) -> Nest:
    """Returns `cotangent * d outputs / d inputs` in the structure of `inputs`, with zeros for independent inputs."""
    flat = tf.nest.flatten(inputs)
    gradients = tape.gradient(
        tf.nest.flatten(outputs),
        flat,
        output_gradients=tf.nest.flatten(cotangent),
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    gradients = [trees.dense(g) for g in gradients]
    if not tf.executing_eagerly():
        # A custom gradient need not tell the shape.
        gradients = [g if g.shape.rank else tf.ensure_shape(g, x.shape) for g, x in zip(gradients, flat, strict=True)]
    return tf.nest.pack_sequence_as(inputs, gradients)
