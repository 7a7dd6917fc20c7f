"""A model served, or a gateway before many: the OpenAI-compatible API, budgets, metrics, pages, a chat."""
