"""Checkpoints in fewer bits that transformers and vLLM read: ``pack-quantized`` of compressed-tensors."""
