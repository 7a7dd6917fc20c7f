"""What a fit writes: one seam, what a part of a model can be stored as, what it costs, how it is decoded."""
