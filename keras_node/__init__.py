"""Neural ordinary differential equations for Keras 3 on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_node needs Keras on the TensorFlow backend: set KERAS_BACKEND=tensorflow before you import Keras. "
        f"Received: backend={keras.backend.backend()!r}"
    )

from keras_node import plots, utils
from keras_node.callbacks import GrowingHorizon, SolverMonitor
from keras_node.control import ControlPath, control_path
from keras_node.events import Event, EventHistory
from keras_node.gradcheck import GradientCheck, gradcheck
from keras_node.gradients.backsolve import BacksolveAdjoint
from keras_node.gradients.checkpointed import CheckpointedAdjoint
from keras_node.gradients.direct import DirectGradient
from keras_node.gradients.reversible import ReversibleAdjoint
from keras_node.layers.concat_squash import ConcatSquash, ConcatSquashField
from keras_node.layers.grey_box_field import GreyBoxField
from keras_node.layers.gru_ode import GRUODEField
from keras_node.layers.hamiltonian_field import HamiltonianField
from keras_node.layers.neural_cde import NeuralCDE
from keras_node.layers.ode_layer import ODELayer
from keras_node.layers.ode_rnn import ODERNN
from keras_node.layers.ode_rnn_cell import ODERNNCell
from keras_node.layers.renamed import SecondOrder, TimeConcatenation
from keras_node.layers.second_order_field import SecondOrderField
from keras_node.layers.time_concatenation_field import TimeConcatenationField
from keras_node.layers.trainable_scalar import TrainableScalar
from keras_node.models.continuous_flow import ContinuousFlow
from keras_node.models.dynamics_model import DynamicsModel
from keras_node.models.latent_ode import LatentODE
from keras_node.odeint import odeint
from keras_node.solution import Solution, Stats, Status
from keras_node.solvers.runge_kutta import RungeKutta

__version__ = "0.2.0"

__all__ = [
    "ODERNN",
    "BacksolveAdjoint",
    "CheckpointedAdjoint",
    "ConcatSquash",
    "ConcatSquashField",
    "ContinuousFlow",
    "ControlPath",
    "DirectGradient",
    "DynamicsModel",
    "Event",
    "EventHistory",
    "GRUODEField",
    "GradientCheck",
    "GreyBoxField",
    "GrowingHorizon",
    "HamiltonianField",
    "LatentODE",
    "NeuralCDE",
    "ODELayer",
    "ODERNNCell",
    "ReversibleAdjoint",
    "RungeKutta",
    "SecondOrder",
    "SecondOrderField",
    "Solution",
    "SolverMonitor",
    "Stats",
    "Status",
    "TimeConcatenation",
    "TimeConcatenationField",
    "TrainableScalar",
    "control_path",
    "gradcheck",
    "odeint",
    "plots",
    "utils",
]
