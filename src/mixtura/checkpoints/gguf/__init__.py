"""GGUF files: an ordinary checkpoint as llama.cpp reads it, written tensor by tensor."""
