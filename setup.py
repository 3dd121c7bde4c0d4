"""The part of the build that is not declarative: where packages lie, and the C++ extension.

Each instruction set is one source file with flags of its own; which one runs is chosen at run time.
"""

import os
import platform
import sys

from setuptools import setup

PACKAGES = [
    "l2l_fast",
    "l2l_fast.backends",
    "l2l_fast.cli",
    "l2l_fast.datasets",
    "l2l_fast.experiments",
    "l2l_fast.kernels",
    "l2l_fast.meta",
    "l2l_fast.problems",
    "l2l_fast.weights",
]

X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ]  # fmt: skip

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
# Contraction into FMA is wanted; nothing else that changes results is.
# -Wmaybe-uninitialized misfires inside the AVX-512 intrinsics of GCC before 13.
KERNEL_FLAGS = [*CXX_FLAGS, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def extension_arguments() -> dict:
    """Arguments of ``setup`` that build ``l2l_fast._C``."""
    from pybind11.setup_helpers import Pybind11Extension

    macros = [(f"L2L_HAVE_{name.upper()}", "1") for name in INSTRUCTION_SETS]
    headers = [f"csrc/{name}" for name in sorted(os.listdir("csrc")) if name.endswith((".h", ".inl"))]
    libraries = [
        (
            f"l2l_{name}",
            {"sources": [f"csrc/kernels_{name}.cpp"], "cflags": [*KERNEL_FLAGS, *flags], "obj_deps": {"": headers}},
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]
    extension = Pybind11Extension(
        "l2l_fast._C",
        ["csrc/bindings.cpp", "csrc/driver.cpp", "csrc/weights.cpp"],
        cxx_std=17,
        define_macros=macros,
        depends=headers,
        extra_compile_args=[*CXX_FLAGS, *OPENMP],
        extra_link_args=OPENMP,
    )
    return {"ext_modules": [extension], "libraries": libraries}


setup(
    packages=PACKAGES,
    package_dir={"l2l_fast.kernels": "kernels"},
    # A wheel without the extension would be silently slow, so leaving it out takes a decision.
    **({} if os.environ.get("L2L_FAST_NO_EXT") == "1" else extension_arguments()),
)
