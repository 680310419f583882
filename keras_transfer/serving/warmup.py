"""Warm-up requests, which TensorFlow Serving replays before it accepts real ones.

`assets.extra/tf_serving_warmup_requests` contains TFRecords of PredictionLog messages.
The few fields needed are declared here, so that warm-up records can be written without
installing tensorflow-serving-api and gRPC. Messages that TensorFlow defines itself
(tensors, examples) are serialized by TensorFlow. Source:
tensorflow_serving/apis/*.proto.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow.core.framework.tensor_pb2 import TensorProto

from keras_transfer.runtime.c_api import Request

RECORDS = Path("assets.extra") / "tf_serving_warmup_requests"

_FIELD = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "PredictionLog": {
        "classify_log": (2, "ClassifyLog"),
        "predict_log": (6, "PredictLog"),
    },
    "ClassifyLog": {"request": (1, "ClassificationRequest")},
    "ClassificationRequest": {"model_spec": (1, "ModelSpec"), "input": (2, "Input")},
    "Input": {"example_list": (1, "ExampleList")},
    "ExampleList": {"examples": (1, "[bytes]")},
    "PredictLog": {"request": (1, "PredictRequest")},
    "PredictRequest": {"model_spec": (1, "ModelSpec"), "inputs": (2, "[InputsEntry]")},
    "InputsEntry": {"key": (1, "string"), "value": (2, "bytes")},  # a map's entry
    "ModelSpec": {"signature_name": (3, "string")},
}
"""(number, type) by message and field. Tensors and examples are declared as bytes: the
wire formats of an embedded message and of its serialized bytes are the same."""

_SCALARS = {"string": _FIELD.TYPE_STRING, "bytes": _FIELD.TYPE_BYTES}


def write_records(path: Path, requests: Sequence[Request]) -> None:
    """Writes requests as TFRecords; `classify` uses the Classification API."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for request in requests:
            writer.write(_to_log(request).SerializeToString(deterministic=True))


def read_records(path: Path) -> Iterator[Request]:
    """Reads the requests in a file of TFRecords."""
    for record in tf.data.TFRecordDataset(str(path)):
        log = _prediction_log()
        log.ParseFromString(record.numpy())
        if log.HasField("classify_log"):
            asked = log.classify_log.request
            examples = np.array([*asked.input.example_list.examples], object)
            inputs = {"inputs": examples}
        else:
            asked = log.predict_log.request
            inputs = {
                entry.key: tf.make_ndarray(TensorProto.FromString(entry.value))
                for entry in asked.inputs
            }
        yield Request(asked.model_spec.signature_name, inputs)


def _to_log(request: Request) -> Any:
    log = _prediction_log()
    if request.signature == "classify":
        asked = log.classify_log.request
        asked.input.example_list.examples.extend(request.inputs["inputs"])
    else:
        asked = log.predict_log.request
        for name, array in request.inputs.items():
            tensor = tf.make_tensor_proto(array).SerializeToString()
            asked.inputs.add(key=name, value=tensor)
    asked.model_spec.signature_name = request.signature
    return log


def _prediction_log() -> Any:
    return message_factory.GetMessageClass(
        _POOL.FindMessageTypeByName("kt.PredictionLog")
    )()


def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="kt.proto", package="kt")
    file.syntax = "proto3"
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            inner = kind.strip("[]")
            field = message.field.add(name=field_name, number=number)
            field.label = (
                _FIELD.LABEL_REPEATED if kind[0] == "[" else _FIELD.LABEL_OPTIONAL
            )
            field.type = _SCALARS.get(inner, _FIELD.TYPE_MESSAGE)
            if inner not in _SCALARS:
                field.type_name = f".kt.{inner}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


_POOL = _pool()
