"""Wrappers of runtime libraries: TensorFlow's C API and OpenVINO.

Reading order: openvino, c_api.
"""
