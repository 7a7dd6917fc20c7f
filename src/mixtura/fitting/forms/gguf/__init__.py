"""llama.cpp's format: each tensor in one of llama.cpp's types, experts of a layer and projection in one."""
