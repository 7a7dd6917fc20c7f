"""Several whole models with one tokenizer as one: reading, mixing, training, scoring, generating, saving."""
