"""Libraries below the data: TensorFlow's C API and OpenVINO.

Reading order: openvino, c_api.
"""
