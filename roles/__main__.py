"""`python -m roles` is the same program as `juicebox-hsm`."""

from __future__ import annotations

from roles.cli import main

if __name__ == "__main__":
    main()
