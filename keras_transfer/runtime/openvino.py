"""Import of OpenVINO and detection of the CPU's arithmetic capabilities."""

import functools
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType

# Instruction sets that oneDNN distinguishes, weakest first, by its own names, with the
# Linux CPU flags that each requires. Its results differ between them in the last bits.
_INSTRUCTION_SETS = {
    "SSE41": {"sse4_1"},
    "AVX": {"avx"},
    "AVX2": {"avx2"},
    "AVX2_VNNI": {"avx2", "avx_vnni"},
    "AVX512_CORE": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "AVX512_CORE_VNNI": {"avx512f", "avx512bw", "avx512_vnni"},
    "AVX512_CORE_BF16": {"avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"},
    "AVX512_CORE_FP16": {"avx512f", "avx512_bf16", "avx512_fp16"},
    "AVX512_CORE_AMX": {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
}
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment, in oneDNN's order


def cpu_has_bf16() -> bool:
    """Returns whether OpenVINO can compute in bfloat16 on this CPU."""
    core = import_openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def instruction_set() -> str:
    """Returns the best instruction set that oneDNN may use, like `AVX512_CORE_BF16`.

    Features are bit-identical only between machines on which this value is the same. If
    the system does not list the CPU's flags, the value is the processor's name or
    architecture instead.
    """
    found = _cpu()
    names = list(_INSTRUCTION_SETS)
    for variable in _LIMITS:
        limit = os.environ.get(variable, "").upper()
        if found in names and limit in names:
            return names[min(names.index(found), names.index(limit))]
    return found


@functools.cache
def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    fitting = [name for name, needed in _INSTRUCTION_SETS.items() if needed <= flags]
    return fitting[-1] if fitting else platform.machine()


def import_openvino() -> ModuleType:
    """Imports the openvino module without its telemetry.

    OpenVINO normally reports every conversion over the network and writes to the home
    directory. Without its telemetry package it does neither.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
