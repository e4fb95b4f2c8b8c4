"""The base class of models that are trained by likelihood, without targets."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops


class LikelihoodModel(keras.Model):
    """A model that is trained by the likelihood of its inputs, and needs no targets.

    `loss = (w[0] * losses[0] + ... + w[n - 1] * losses[n - 1]) / n + sum(model.losses)`

    A subclass computes the losses of the `n` samples in `sample_losses`. `w` is `sample_weight`, or 1. Like the losses
    of Keras by default, this one divides by `n` and not by the sum of the weights. `model.losses` holds the
    regularizers and the values that were passed to `add_loss`; they are not weighted.

    With several devices (`tf.distribute`), each device has a weight in proportion to its number of samples. So losses
    and gradients are the same as on one device, even if a batch does not divide evenly or a device gets no samples.
    Only the first batch must divide evenly, as for every model of Keras.
    """

    # The names of means that are reported in addition to the loss. `sample_losses` returns their values.
    measures: tuple[str, ...] = ()
    # The shapes of the inputs, which `build` keeps for `export`.
    inputs_shape: Any = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", *self.measures)]

    def sample_losses(self, x: Any, y: Any, y_pred: Any, training: bool) -> tuple[tf.Tensor, dict[str, tuple]]:
        """Computes the loss of each sample.

        Args:
            x: a batch of inputs.
            y: a batch of the data that the model is compared with, or `None`.
            y_pred: the output of the model for `x`, or `None`.
            training: whether the model is in training mode.

        Returns:
            The losses, and for each name in `measures` a pair: its values, and their weights (0 or 1).
        """
        raise NotImplementedError

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        """Computes the loss of a batch and updates the metrics.

        Args:
            x: the inputs.
            y: the data that the model is compared with, if the model takes them.
            y_pred: the output of the model for `x`, if it is known.
            sample_weight: weights of the samples, in the shape of their losses or of its first axes.
            training: whether the model is in training mode.

        Returns:
            The loss, a scalar. With several devices, the share of this device; their sum is the loss.
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

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = _unpacked(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, sample_weight=sample_weight, training=True)
            loss = self.optimizer.scale_loss(loss)
        if not self.optimizer.built:
            self._build_optimizer()
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return self.get_metrics_result()

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = _unpacked(data)
        self.compute_loss(x, y, sample_weight=sample_weight, training=False)
        return self.get_metrics_result()

    def prepare_data(self, arguments: dict[str, Any], trains: bool) -> dict[str, Any]:
        """Prepares the arguments of `fit` or `evaluate`. A subclass may change what data they accept.

        Args:
            arguments: the arguments by their names.
            trains: whether they are those of `fit`.
        """
        del trains
        return arguments

    # Keras drops the weights of arrays without targets. So here the weights are passed in the place of the targets.

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        arguments = self.prepare_data(_bound(super().fit, args, kwargs), trains=True)
        _refuse_class_weight(arguments)
        self._build_ahead(arguments.get("x"))
        validation_data = arguments.get("validation_data")
        if isinstance(validation_data, list | tuple) and len(validation_data) == 3:
            x, y, sample_weight = validation_data
            arguments["validation_data"] = x, _packed(y, sample_weight)
        return super().fit(**_with_packed_weights(arguments))

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.prepare_data(_bound(super().evaluate, args, kwargs), trains=False)
        return super().evaluate(**_with_packed_weights(arguments))

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        arguments = _bound(super().train_on_batch, args, kwargs)
        _refuse_class_weight(arguments)
        return super().train_on_batch(**arguments)

    def _spec_of_export(self, name: int | str | None, shape: tuple) -> tf.TensorSpec:
        """Returns what an exported model takes for an input of this shape: any number of samples.

        Args:
            name: the place of the input in a tuple, its key in a dictionary, or `None` for a single input.
            shape: the shape with which the model was built.
        """
        is_mask = name in (2, "mask")  # of `(times, values, mask)`
        return tf.TensorSpec(
            (None, *shape[1:]) if len(shape) > 1 else shape, "bool" if is_mask else self.variable_dtype
        )

    @functools.wraps(keras.Model.export)
    def export(self, *args: Any, **kwargs: Any) -> Any:
        # Keras knows the inputs of a model that has been called, but not of one that has only been trained, and it
        # takes every input for a number.
        arguments = _bound(super().export, args, kwargs)
        if (
            arguments.get("input_signature") is None
            and "input_signature" in inspect.signature(super().export).parameters
        ):
            if self.inputs_shape is None:
                raise ValueError(
                    "The model does not know the shapes of its inputs yet: train it or call it first, or pass "
                    f"`input_signature`. Received: the model {self.name!r}, input_signature=None"
                )
            arguments["input_signature"] = [_with_names(self._spec_of_export, self.inputs_shape)]
        return super().export(**arguments)

    # If a trace of a training step makes variables, TensorFlow traces the step once more.

    def _build_optimizer(self) -> None:
        """Makes the variables of the optimizer outside of the trace, as soon as all weights are known."""
        # TensorFlow sees what variables a trace makes, but only those of its own thread. If anything fails here, the
        # optimizer stays as it is, and tries again by itself when it is applied.
        thread = threading.Thread(target=self.optimizer.build, args=(self.trainable_weights,))
        thread.start()
        thread.join()

    def _build_ahead(self, x: Any) -> None:
        """Makes the weights of the model for the data of `fit`, if these tell their shapes."""
        if isinstance(x, tf.data.Dataset):
            x, _, _ = keras.utils.unpack_x_y_sample_weight(x.element_spec)
        shapes = [getattr(leaf, "shape", None) for leaf in keras.tree.flatten(x)]
        if self.built or any(shape is None or tf.TensorShape(shape).rank is None for shape in shapes):
            return
        with self.distribute_strategy.scope():
            self.build(keras.tree.map_structure(lambda leaf: tuple(leaf.shape), x))

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: None = None,
        loss_weights: None = None,
        metrics: None = None,
        weighted_metrics: None = None,
        **kwargs: Any,
    ) -> None:
        """Configures training like `keras.Model.compile`, but takes no loss and no metrics: the model has its own."""
        refused = {
            "loss": loss,
            "loss_weights": loss_weights,
            "metrics": metrics,
            "weighted_metrics": weighted_metrics,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"A {type(self).__name__} has its own loss and metrics: leave `{name}` out of `compile`. "
                    f"Received: {name}={value!r}"
                )
        super().compile(optimizer, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[keras.Metric]:
        # `compile` of Keras creates another tracker for the loss, which this class does not use.
        others = [m for m in super().metrics if m not in self.trackers]
        return [*self.trackers, *(m for m in others if m.name != "loss")]


def _with_names(function: Callable[[Any, tuple], Any], shapes: Any) -> Any:
    """Calls a function with the name and the shape of every input."""
    if isinstance(shapes, dict):
        return {name: function(name, tuple(shape)) for name, shape in shapes.items()}
    if all(d is None or isinstance(d, int) for d in shapes):
        return function(None, tuple(shapes))
    return tuple(function(name, tuple(shape)) for name, shape in enumerate(shapes))


def _share_of_replica(count: tf.Tensor) -> Any:
    """Returns the share of the batch that this replica has, because the gradients of replicas are added up."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return 1.0
    count = tf.cast(count, tf.float32)
    return count / replica.all_reduce(tf.distribute.ReduceOp.SUM, count)


def _weights(sample_weight: Any, losses: tf.Tensor) -> tf.Tensor:
    """Returns weights in the shape of the losses."""
    weights = ops.cast(ops.convert_to_tensor(sample_weight), losses.dtype)
    if len(weights.shape) == len(losses.shape) + 1 and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    known = zip(weights.shape, losses.shape, strict=False)
    if len(weights.shape) > len(losses.shape) or any(None not in pair and pair[0] != pair[1] for pair in known):
        raise ValueError(
            "`sample_weight` must have the shape of the losses, or of their first axes. Received: "
            f"sample_weight.shape={tuple(weights.shape)} for losses of shape {tuple(losses.shape)}"
        )
    return ops.broadcast_to(_expanded(weights, losses), ops.shape(losses))


def _expanded(weights: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Appends axes to `weights`, so that they can be multiplied with `like`."""
    return ops.reshape(weights, (*ops.shape(weights), *[1] * (len(like.shape) - len(weights.shape))))


def _bound(method: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by their names."""
    arguments = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
    others = arguments.pop("kwargs", {})
    return {**arguments, **others}


def _refuse_class_weight(arguments: dict[str, Any]) -> None:
    if arguments.get("class_weight") is not None:
        raise ValueError(
            "`class_weight` needs targets, and this model takes none: give each sample its weight in `sample_weight`. "
            f"Received: class_weight={arguments['class_weight']!r}"
        )


def _with_packed_weights(arguments: dict[str, Any]) -> dict[str, Any]:
    """Moves the weights of arrays into the targets, in the arguments of `fit` or `evaluate`.

    Data sets contain their own weights, so their arguments stay as they are.
    """
    are_arrays = all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(arguments.get("x")))
    if arguments.get("sample_weight") is None or not are_arrays:
        return arguments
    return {**arguments, "y": _packed(arguments.get("y"), arguments["sample_weight"]), "sample_weight": None}


def _packed(y: Any, sample_weight: Any) -> Any:
    if sample_weight is None:
        return y
    targets = {} if y is None else {"y": y}
    return {**targets, "sample_weight": np.asarray(sample_weight)}


def _unpacked(data: Any) -> tuple:
    """Returns the inputs, targets and weights of a batch."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if isinstance(y, dict) and "sample_weight" in y:
        return x, y.get("y"), y["sample_weight"]
    return x, y, sample_weight
