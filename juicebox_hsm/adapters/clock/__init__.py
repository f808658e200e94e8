"""Waiting by the clock: the attempts of one operation and the time they share."""
