"""One module per format on disk: which tensors belong to a weight, and how they become canonical codes."""
