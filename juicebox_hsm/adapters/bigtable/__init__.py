"""Store realms in Cloud Bigtable or its emulator (storage.md parts A and B; decision records 0003 and 0013)."""

from typing import Final

EMULATOR_VARIABLE: Final = "BIGTABLE_EMULATOR_HOST"
"""Names Google's emulator, here because who starts it needs none of the libraries."""
