"""Building and loading the optional C++ kernels (native_*.cpp): plain C functions in one shared library.

They are compiled once for this machine's processor (g++, about ten seconds) and kept in the model cache under a
hash of all that they depend on. Where there is no compiler, `load_kernels` says so, and the runner uses torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from shared.engine.model_cache import default_cache_dir, make_once
from shared.errors import AmpdError

log = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent
SOURCES = ("native_linear.cpp", "native_attention.cpp", "native_layer.cpp")
HEADERS = ("native_vector.h",)
# Contracting to fused multiply-adds everywhere is what makes a row's result independent of the code path it takes.
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fopenmp",
]
COMPILE_TIMEOUT_S = 120.0
HEAD_DIM_MULTIPLE = 16
PANEL = 16  # PANEL of native_vector.h

_P, _I, _C, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "ampd_pack": [_P, _I, _I, _P, _C, _C],
    "ampd_linear": [_P, _I, _I, _P, _C, _P, _I, _I, _P, _I, _C, _C],
    "ampd_attention": [_P, _I, _P, _I, _P, _C, _I, _I, _P, _I, _P, _P, _I, _I, _I, _I, _I, _F, _C],
    "ampd_rms_norm": [_P, _I, _I, _I, _P, _F, _P, _I, _C],
    "ampd_rope_and_store": [_P, _I, _I, _I, _I, _I, _P, _P, _P, _P, _F, _P, _C, _I, _I, _P, _P, _C],
    "ampd_silu_and_multiply": [_P, _I, _I, _I, _C],
}


class NativeUnavailable(Exception):
    """The kernels cannot be used here; the message says why and what would help."""


@cache
def load_kernels() -> ctypes.CDLL:
    """The library, compiled first if need be. Raises NativeUnavailable."""
    wanted = os.environ.get("CXX", "g++")
    compiler = shutil.which(wanted)
    if compiler is None:
        raise NativeUnavailable(f"no {wanted} found: install it (or set CXX) for faster attention and linear layers")
    try:
        folder = make_once(
            default_cache_dir(), f"native-{_build_key(compiler)}", lambda into: _compile(compiler, into), log.info
        )
        library = ctypes.CDLL(str(folder / "libampd.so"))
    except (OSError, subprocess.SubprocessError, AmpdError) as error:
        raise NativeUnavailable(f"the C++ kernels cannot be built or loaded: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def _compile(compiler: str, into: Path) -> None:
    log.info("compiling the C++ kernels for this processor, once (about ten seconds)")
    sources = [str(SOURCE_DIR / name) for name in SOURCES]
    command = [compiler, *FLAGS, "-shared", *sources, "-o", str(into / "libampd.so"), *_openmp_runtime()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if result.returncode != 0:
        raise NativeUnavailable(f"{compiler} failed: {result.stderr[-2000:]}")


def _openmp_runtime() -> list[str]:
    """torch's own OpenMP library: a second one in the process would bring a second set of spinning threads."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))][:1]


def _build_key(compiler: str) -> str:
    """Changes with the sources, the flags, the compiler, torch and the processor's instruction set."""
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, torch.__version__, platform.machine()]).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((SOURCE_DIR / name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
    digest.update(version.stdout)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        digest.update(
            "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})).encode()
        )
    return digest.hexdigest()[:16]
