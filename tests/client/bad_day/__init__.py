"""Dangerous states, each caused on a real demo: who says so, and after how long. `scripts/bad-day` runs them.

`day` holds what a state is, `listening` what is listened to; `cluster_states` and `store_states` cause the states.
"""
