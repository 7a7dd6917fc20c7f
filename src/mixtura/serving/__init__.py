"""A model served: requests that run together, the OpenAI-compatible API, metrics, a dashboard, and a chat."""
