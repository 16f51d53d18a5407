"""Quantization of models in 16 and 32 bits, layer by layer, into the modules that quantized checkpoints load into."""
