"""How the specimen is made: its training, and the figures on its card."""
