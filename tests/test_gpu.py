"""What XLA makes for a GPU, which it does on a machine without one, up to the program in its own language."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import solvers

FEW_STEPS = keras_node.RungeKutta("bosh3", max_steps=64)
STATE = tf.constant(np.linspace(-1, 1, 6), tf.float32, shape=(2, 3))
TIMES = tf.constant([[0.0, 0.5, 1.0, 1.5], [0.0, 0.2, 0.9, 1.1]])
SERIES = tf.constant(np.linspace(-1, 1, 24), tf.float32, shape=(2, 4, 3))


def field(units=3):
    return keras.layers.Dense(units, activation="tanh")


def lowered(layer, *inputs):
    """The program for a GPU of a layer and its gradient, in XLA's language."""
    layer(*inputs)

    def gradients(weights, states, *inputs):
        with tf.GradientTape() as tape:
            tape.watch([weights, inputs])
            outputs, _ = layer.stateless_call(weights, states, *inputs, training=True)
            loss = tf.add_n([tf.reduce_sum(tf.sin(y)) for y in tf.nest.flatten(outputs)])
        return loss, tape.gradient(loss, [weights, inputs], unconnected_gradients="zero")

    values = [
        [tf.convert_to_tensor(v) for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)
    ]
    function = tf.function(gradients, jit_compile=True)
    return function.experimental_get_compiler_ir(*values, *inputs)(stage="hlo", platform_name="GPU")


def assert_is_a_program_with_loops(program, count=2):
    """The loops of the solve and of its gradient are parts of the program."""
    assert program.startswith("HloModule")
    assert program.count(" while(") >= count


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "direct", "reversible"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_an_ode_layer_compiles_for_a_gpu_with_every_gradient(gradient, per_sample):
    solver = keras_node.RungeKutta("bosh3", max_steps=64, per_sample=per_sample)
    layer = keras_node.ODELayer(field(), solver=solver, gradient=gradient)
    assert_is_a_program_with_loops(lowered(layer, STATE))


@pytest.mark.parametrize("method", solvers.TABLEAUS)
def test_an_ode_layer_compiles_for_a_gpu_with_every_method(method):
    steps = {"max_steps": 64} if solvers.TABLEAUS[method].embedded else {"num_steps": 2}
    symplectic = solvers.TABLEAUS[method].symplectic
    rate = keras_node.SecondOrderField(lambda y: -tf.sin(y[:, :2])) if symplectic else field()
    layer = keras_node.ODELayer(rate, solver=keras_node.RungeKutta(method, **steps))
    assert_is_a_program_with_loops(lowered(layer, tf.zeros((2, 4)) if symplectic else STATE))


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_recurrent_layers_compile_for_a_gpu(gradient):
    rnn = keras_node.ODERNN(keras.layers.GRUCell(3), field(), solver=FEW_STEPS, gradient=gradient)
    cde = keras_node.NeuralCDE(3, solver=FEW_STEPS, gradient=gradient)
    for layer in (rnn, cde):
        assert_is_a_program_with_loops(lowered(layer, SERIES, TIMES))


def test_models_compile_for_a_gpu():
    flow = keras_node.ContinuousFlow(3, keras_node.ConcatSquashField((4,)), solver=FEW_STEPS)
    assert_is_a_program_with_loops(lowered(flow, STATE))
    latent = keras_node.LatentODE(2, units=4, solver=FEW_STEPS)
    assert_is_a_program_with_loops(lowered(latent, (TIMES, SERIES, tf.ones_like(SERIES))))


def test_a_convolutional_field_compiles_for_a_gpu():
    layer = keras_node.ODELayer(keras.layers.Conv2D(2, 3, padding="same"), solver=FEW_STEPS)
    assert_is_a_program_with_loops(lowered(layer, tf.ones((2, 4, 4, 2))))
