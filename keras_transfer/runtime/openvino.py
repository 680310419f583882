"""OpenVINO: its import, and what this CPU computes fast."""

import sys


def cpu_has_bf16() -> bool:
    """Whether this CPU computes with bfloat16."""
    core = import_openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def import_openvino():
    """The openvino module, without its telemetry.

    By itself it reports every conversion over the network and writes to the home
    directory; where its telemetry package is not to be found, it does neither.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
