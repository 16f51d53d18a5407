"""Quantization of models in 16 and 32 bits: layer by layer, into the same modules that quantized checkpoints load into."""
