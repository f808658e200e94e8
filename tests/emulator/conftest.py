"""Show values of failed assertions in the contract suite, which is not a test module itself."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.emulator.contract", "tests.emulator.contract_outbox", "tests.emulator.realm_data")
