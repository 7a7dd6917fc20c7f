"""Several requests in one model at once: who runs, in which memory, and what comes out."""
