"""Text, tasks and the specimen: what models are observed on, measured on and trained on."""
