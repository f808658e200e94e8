"""The trusted core of an HSM: one sans-IO state machine (hsm.md 6-13)."""
