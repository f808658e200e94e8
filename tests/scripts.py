"""The programs in `scripts/`, which have no ending, as modules."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "scripts"


def load_script(name: str) -> Any:
    """Return the program as a module; it is not run."""
    module_name = f"scripts_{name}"
    loader = SourceFileLoader(module_name, str(FOLDER / name))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module
