"""Models on many devices: what a placement of experts costs, and running it."""
