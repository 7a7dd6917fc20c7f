"""What this machine is and grants: its limits, what was measured on it, and the releases that are installed."""
