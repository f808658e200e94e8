"""One leadership of one group as a machine with one door; the contract is in `machine`."""
