"""The machine: what it grants this process, and what was measured on it once."""
