"""What the models that bring their own loss have in common."""

import functools
import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops


class LikelihoodModel(keras.Model):
    """A model that is trained by the likelihood of its inputs, and needs no targets.

    A subclass gives the loss of each sample in `sample_losses`. `fit` minimises, for `n` samples,

    `loss = (w[0] * losses[0] + ... + w[n - 1] * losses[n - 1]) / n + sum(model.losses)`

    where `w` is `sample_weight`, or 1. The sum is divided by `n` and not by the sum of the weights, as Keras' own
    losses do by default. `model.losses` are the regularizers and what was given to `add_loss`, without weights.

    On several devices (`tf.distribute`) each one counts as much as it has samples. So losses and gradients are those
    of one device also where a batch does not divide evenly, or leaves a device without samples.
    """

    # Means to report next to the loss. `sample_losses` returns their values.
    measures: tuple[str, ...] = ()

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", *self.measures)]

    def sample_losses(self, x: Any, y: Any, y_pred: Any, training: bool) -> tuple[tf.Tensor, dict[str, tuple]]:
        """The loss of each sample, and for each of `measures` its values and the weights (0 or 1) of these.

        Args:
            x: a batch of inputs.
            y: a batch of what the model compares with, or `None`.
            y_pred: what the model returned for `x`, or `None`.
            training: whether the model is in training mode.
        """
        raise NotImplementedError

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a batch, of shape `()`. On several devices, the part of this one: the sum is the loss.

        Updates the metrics.

        Args:
            x: the inputs.
            y: what the model compares with, where it takes such.
            y_pred: the output of the model for `x`, where it is known.
            sample_weight: weights of the samples, in the shape of their losses, or of its first axes.
            training: whether the model is in training mode.
        """
        losses, measures = self.sample_losses(x, y, y_pred, training)
        weights = ops.ones_like(losses) if sample_weight is None else _weights(sample_weight, losses)
        count = tf.size(losses)
        mean = tf.math.divide_no_nan(ops.sum(weights * losses), ops.cast(count, losses.dtype))
        loss = mean + sum(ops.cast(ops.sum(added), mean.dtype) for added in self.losses)
        updates = {"loss": (loss, count)}
        for name, (values, counts) in measures.items():
            updates[name] = values, ops.cast(counts, weights.dtype) * _expanded(weights, values)
        for tracker in self.trackers:
            values, counts = updates[tracker.name]
            tracker.update_state(tf.stop_gradient(values), counts)
        return loss * ops.cast(_share_of_replica(count), loss.dtype)

    def train_step(self, data):
        x, y, sample_weight = _unpacked(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, sample_weight=sample_weight, training=True)
            loss = self.optimizer.scale_loss(loss)
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return self.get_metrics_result()

    def test_step(self, data):
        x, y, sample_weight = _unpacked(data)
        self.compute_loss(x, y, sample_weight=sample_weight, training=False)
        return self.get_metrics_result()

    # Keras drops weights that come with arrays but without targets, so here they travel in the place of the targets.

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        arguments = _bound(super().fit, args, kwargs)
        _refuse_class_weight(arguments)
        validation_data = arguments.get("validation_data")
        if isinstance(validation_data, list | tuple) and len(validation_data) == 3:
            x, y, sample_weight = validation_data
            arguments["validation_data"] = x, _packed(y, sample_weight)
        return super().fit(**_with_packed_weights(arguments))

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):
        return super().evaluate(**_with_packed_weights(_bound(super().evaluate, args, kwargs)))

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args, **kwargs):
        arguments = _bound(super().train_on_batch, args, kwargs)
        _refuse_class_weight(arguments)
        return super().train_on_batch(**arguments)

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, metrics=None, weighted_metrics=None, **kwargs):
        """Configures training as `keras.Model.compile` does, without a loss and metrics: the model brings its own."""
        refused = {
            "loss": loss,
            "loss_weights": loss_weights,
            "metrics": metrics,
            "weighted_metrics": weighted_metrics,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"A {type(self).__name__} brings its own loss and metrics: `compile` takes no `{name}`. "
                    f"Received: {name}={value!r}"
                )
        super().compile(optimizer, **kwargs)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        # `compile` makes a tracker for the loss as well, which this class does not use.
        others = [m for m in super().metrics if m not in self.trackers]
        return [*self.trackers, *(m for m in others if m.name != "loss")]


def _share_of_replica(count):
    """How much of the batch's samples this replica has: gradients of replicas are added up."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return 1.0
    count = tf.cast(count, tf.float32)
    return count / replica.all_reduce(tf.distribute.ReduceOp.SUM, count)


def _weights(sample_weight, losses):
    """Weights in the shape of the losses."""
    weights = ops.cast(ops.convert_to_tensor(sample_weight), losses.dtype)
    if len(weights.shape) == len(losses.shape) + 1 and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    known = zip(weights.shape, losses.shape, strict=False)
    if len(weights.shape) > len(losses.shape) or any(None not in pair and pair[0] != pair[1] for pair in known):
        raise ValueError(
            "`sample_weight` must have the shape of the samples, or of their first axes. Received: "
            f"sample_weight.shape={tuple(weights.shape)} for losses of shape {tuple(losses.shape)}"
        )
    return ops.broadcast_to(_expanded(weights, losses), ops.shape(losses))


def _expanded(weights, like):
    """`weights` with axes at the end, to multiply `like`."""
    return ops.reshape(weights, (*ops.shape(weights), *[1] * (len(like.shape) - len(weights.shape))))


def _bound(method, args, kwargs):
    """The arguments of a call, by name."""
    arguments = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
    others = arguments.pop("kwargs", {})
    return {**arguments, **others}


def _refuse_class_weight(arguments):
    if arguments.get("class_weight") is not None:
        raise ValueError(
            "There are no classes to weigh without targets: give every sample its weight in `sample_weight`. "
            f"Received: class_weight={arguments['class_weight']!r}"
        )


def _with_packed_weights(arguments):
    """Arguments of `fit` or `evaluate` with the weights of arrays beside the targets. Data sets bring their own."""
    are_arrays = all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(arguments.get("x")))
    if arguments.get("sample_weight") is None or not are_arrays:
        return arguments
    return {**arguments, "y": _packed(arguments.get("y"), arguments["sample_weight"]), "sample_weight": None}


def _packed(y, sample_weight):
    if sample_weight is None:
        return y
    targets = {} if y is None else {"y": y}
    return {**targets, "sample_weight": np.asarray(sample_weight)}


def _unpacked(data):
    """The inputs, targets and weights of a batch."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if isinstance(y, dict) and "sample_weight" in y:
        return x, y.get("y"), y["sample_weight"]
    return x, y, sample_weight
