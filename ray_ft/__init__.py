"""ray-ft: fine-tune and serve large language models on Ray clusters, from one recipe."""

__version__ = "0.1.0"
