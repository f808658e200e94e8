"""Name the C extension, and note the commit in what is built; everything else is in pyproject.toml."""

import json
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

QUESTIONS = {
    "hash": ["rev-parse", "HEAD"],
    "tag": ["describe", "--tags", "--exact-match"],
    "branch": ["rev-parse", "--abbrev-ref", "HEAD"],
}


def commit() -> dict[str, str]:
    """Return what git says about this checkout, {} outside of one."""
    here = Path(__file__).parent
    if not (here / ".git").exists():
        return {}  # an unpacked source distribution, possibly inside somebody else's checkout
    found = {}
    for name, question in QUESTIONS.items():
        try:
            said = subprocess.run(  # noqa: S603 - fixed questions
                ["git", *question],  # noqa: S607 - the builder's git
                cwd=here, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError:
            return {}
        if said.returncode == 0:
            found[name] = said.stdout.strip()
    return found


class BuildWithCommit(build_py):
    """Also writes `juicebox_hsm/build.json`; an editable install has none, for its commit changes underneath it."""

    def run(self) -> None:
        """Copy the packages, then add the file."""
        super().run()
        found = commit()
        if found and not self.editable_mode:
            target = Path(self.build_lib) / "juicebox_hsm" / "build.json"
            target.write_text(json.dumps(found) + "\n", encoding="utf-8")


setup(
    cffi_modules=["native/build_merkle.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    cmdclass={"build_py": BuildWithCommit},
)
