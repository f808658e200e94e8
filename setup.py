"""Name the C extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["native/build_merkle.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
