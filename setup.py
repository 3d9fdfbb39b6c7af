"""Builds the C libraries of packed Linears and packed KV caches; all else is in pyproject.toml.

Optional: without a compiler the package installs and uses torch's operators. Compiled with -fopenmp but not
linked with it, so that the library shares torch's OpenMP runtime (see the two native.py).
"""

import sys

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "llmslim.quantization._packed",
            sources=["llmslim/quantization/csrc/packed.c"],
            depends=["llmslim/quantization/csrc/packed_avx2.h"],
            extra_compile_args=["-O3"] + (["-fopenmp"] if sys.platform == "linux" else []),
            optional=True,
        ),
        Extension(
            "llmslim.kvcache._attend",
            sources=[
                f"llmslim/kvcache/csrc/attend{machine}.c" for machine in ("", "_any", "_avx2", "_avx512")
            ],
            depends=["llmslim/kvcache/csrc/attend.h", "llmslim/kvcache/csrc/attend_loops.h"],
            extra_compile_args=["-O3"] + (["-fopenmp"] if sys.platform == "linux" else []),
            optional=True,
        ),
    ]
)
