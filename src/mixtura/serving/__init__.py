"""A model served: requests together, the OpenAI-compatible API, metrics, a dashboard, a chat."""
