"""A run to a model that anything can load: one Hugging Face folder, published only when it is proved."""

from ray_ft.export.folder import export

__all__ = ["export"]
