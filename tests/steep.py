"""A problem whose steps are rejected now and then, for gradients of the discrete solution."""

import numpy as np
import tensorflow as tf

import keras_node

OWN = np.array([[0.0, 0.2, 0.5], [0.6, 0.2, 0.1], [1.2, 0.9, -0.3]])
MATRIX = tf.constant([[-0.1, 1.1], [-1.2, 0.2]], tf.float64)
Y0 = {
    "a": tf.constant([[1.0, 0.5], [0.3, -1.0], [0.1, 0.9]], tf.float64),
    "b": tf.constant([[0.2], [0.1], [-0.4]], tf.float64),
}


def field(t, y, matrix):
    # Steep around t = 0.3, so that steps are rejected.
    push = tf.exp(-200 * (t - 0.3) ** 2)
    return {"a": tf.tanh(y["a"] @ matrix) + push * y["b"], "b": tf.reduce_sum(y["a"], -1, keepdims=True) * tf.sin(t)}


def gradients_of(inputs, gradient, solver, field=field):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y0, matrix, ts = inputs
        ys = keras_node.odeint(field, y0, ts, args=matrix, gradient=gradient, solver=solver).ys
        weights = tf.reshape(tf.range(1, tf.size(ys["a"]) + 1, dtype=tf.float64), tf.shape(ys["a"])) / 10
        value = tf.reduce_sum(weights * tf.sin(ys["a"])) + tf.reduce_sum(ys["b"] ** 2)
    return tf.nest.flatten(tape.gradient(value, inputs))
