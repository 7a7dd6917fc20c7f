"""Text and tasks: what models are observed on, measured on and trained on."""
