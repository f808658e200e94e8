"""Describe the C extension `juicebox_hsm.merkle._native` to setuptools (cffi API mode, stable ABI).

`setup.py` names `ffibuilder`. Flags from the environment (CFLAGS, LDFLAGS) come on top, and a sanitizer among
them turns off the hardening that would get in its way: traps instead of reports, and fortified copies.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cffi import FFI

NATIVE = Path(__file__).resolve().parent
SOURCES = (
    "blake3.c",
    "merkle_bits.c",
    "merkle_codec.c",
    "merkle_delta.c",
    "merkle_proof.c",
    "merkle_overlay.c",
    "merkle_assemble.c",
    "merkle_reshape.c",
    "merkle.c",
)
HEADERS = ("blake3.h", "merkle_api.h", "merkle.h", "merkle_parts.h")

WARNINGS = ("-std=c11", "-Wall", "-Wextra")
HARDENING = (
    "-O3",
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=3",
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",  # stop at once; no runtime library to ship
)
LINUX_LINK = ("-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack")


def flags() -> tuple[list[str], list[str]]:
    """Return (compiler, linker) flags for this platform and environment."""
    if "-fsanitize" in os.environ.get("CFLAGS", ""):
        return list(WARNINGS), []
    return [*WARNINGS, *HARDENING], list(LINUX_LINK) if sys.platform == "linux" else []


compile_flags, link_flags = flags()
ffibuilder = FFI()
ffibuilder.cdef((NATIVE / "merkle_api.h").read_text(encoding="ascii"))
ffibuilder.set_source(
    "juicebox_hsm.merkle._native",
    '#include "merkle.h"',
    sources=[f"native/{name}" for name in SOURCES],
    depends=[f"native/{name}" for name in HEADERS],
    include_dirs=["native"],
    extra_compile_args=compile_flags,
    extra_link_args=link_flags,
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
