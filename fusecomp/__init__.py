"""fusecomp: graph-fusion compilation for LLM inference of unmodified Hugging Face models."""
