"""How a process lives under its supervisor, and what its memory gives away."""
