"""MoE layers of our own, and a language model of them with its parts chosen by name."""
