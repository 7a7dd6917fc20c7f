"""The OpenAI-compatible API over an engine: what may be asked, how it is answered, how it is refused."""
