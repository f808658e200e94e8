"""What people and probes see of a process: logs, metrics, traces, the probe port."""
