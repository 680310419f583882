"""The keras.io transfer-learning recipe, as the guide teaches it, timed by epoch.

Source: keras.io/guides/transfer_learning: image_dataset_from_directory, random flip
and rotation, a frozen base called with training=False, global average pooling,
dropout, one Dense layer, Adam; then, with --finetune-epochs, base.trainable = True (or,
with --finetune-from, of the layers above one only) and Adam(1e-5). Prints one line of
JSON.

    python tests/benchmarks/recipe.py FOLDER --base MobileNetV2 --epochs 1

FOLDER holds train/, val/ and test/ folders of class folders.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--base", default="MobileNetV2")
parser.add_argument("--image-size", type=int, default=224)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--weights", default="imagenet")
parser.add_argument("--finetune-epochs", type=int, default=0)
parser.add_argument("--finetune-from", help="the last layer that stays frozen")
parser.add_argument("--no-augmentation", action="store_true")
parser.add_argument("--predictions", type=Path, help="NPZ file of test predictions")
arguments = parser.parse_args()

keras.utils.set_random_seed(0)
size = (arguments.image_size, arguments.image_size)


def load(split: str, shuffle: bool) -> tf.data.Dataset:
    return keras.utils.image_dataset_from_directory(
        arguments.folder / split, image_size=size, batch_size=32, shuffle=shuffle
    )


train, val, test = load("train", True), load("val", False), load("test", False)
num_classes = len(train.class_names)
augmentation = [
    keras.layers.RandomFlip("horizontal"),
    keras.layers.RandomRotation(0.1),
]


def augment(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    for layer in augmentation:
        images = layer(images)
    return images, labels


if not arguments.no_augmentation:
    train = train.map(augment, num_parallel_calls=tf.data.AUTOTUNE)
train, val, test = (
    dataset.prefetch(tf.data.AUTOTUNE) for dataset in (train, val, test)
)

base = getattr(keras.applications, arguments.base)(
    include_top=False,
    input_shape=(*size, 3),
    weights=None if arguments.weights == "none" else arguments.weights,
)
base.trainable = False
inputs = keras.Input((*size, 3))
x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
x = base(x, training=False)
x = keras.layers.GlobalAveragePooling2D()(x)
x = keras.layers.Dropout(0.2)(x)
outputs = keras.layers.Dense(num_classes)(x)
model = keras.Model(inputs, outputs)
model.compile(
    keras.optimizers.Adam(),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)


class EpochTimes(keras.callbacks.Callback):
    """Seconds of each epoch's training part, and with its validation."""

    def __init__(self) -> None:
        super().__init__()
        self.training: list[float] = []
        self.whole: list[float] = []

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._start = time.perf_counter()

    def on_test_begin(self, logs=None) -> None:
        self.training.append(time.perf_counter() - self._start)

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.whole.append(time.perf_counter() - self._start)


def on_test_images() -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, C]` and labels `[N]`."""
    logits = np.concatenate([model.predict_on_batch(images) for images, _ in test])
    return logits, np.concatenate([labels for _, labels in test])


def test_accuracy() -> float:
    logits, labels = on_test_images()
    return float((logits.argmax(1) == labels).mean())


times = EpochTimes()
model.fit(
    train,
    validation_data=val,
    epochs=arguments.epochs,
    callbacks=[times],
    verbose=0,
)
result = {
    "train_seconds": times.training,
    "epoch_seconds": times.whole,
    "test_accuracy": test_accuracy(),
}

if arguments.finetune_epochs:
    base.trainable = True
    if arguments.finetune_from:
        for layer in base.layers:
            layer.trainable = False
            if layer.name == arguments.finetune_from:
                break
    model.compile(
        keras.optimizers.Adam(1e-5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    result["finetune_accuracy"] = []
    times = EpochTimes()
    for _ in range(arguments.finetune_epochs):
        model.fit(train, validation_data=val, callbacks=[times], verbose=0)
        result["finetune_accuracy"].append(test_accuracy())
    result["finetune_train_seconds"] = times.training
    result["finetune_epoch_seconds"] = times.whole
if arguments.predictions:
    logits, labels = on_test_images()
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    np.savez(arguments.predictions, probabilities=probabilities, labels=labels)
print(json.dumps(result))
