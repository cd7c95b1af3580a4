"""For vLLM, which calls it in each of its processes: Gemma 3's images without torchvision.

vLLM's Gemma 3 imports the class of the image processor from a module of transformers that computes by torchvision, and
uses the class as an annotation alone: what processes images is what the model's folder gets from transformers, which
without torchvision is its implementation by PIL, the one that rows are trained with. So where there is no torchvision,
that class stands in for the other. The CPU lock leaves torchvision out (requirements/README.md); where it is installed,
as on GPU machines, nothing is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

MODULE = "transformers.models.gemma3.image_processing_gemma3"
BY_PIL = "transformers.models.gemma3.image_processing_pil_gemma3"


def images_by_pil() -> None:
    """Put the module's stand-in where imports find it. May be called again: vLLM says that plugins are."""
    if importlib.util.find_spec("torchvision") is not None or MODULE in sys.modules:
        return
    stand_in = types.ModuleType(MODULE, f"{BY_PIL}, as torchvision is not installed.")
    stand_in.Gemma3ImageProcessor = importlib.import_module(BY_PIL).Gemma3ImageProcessorPil  # type: ignore[attr-defined]
    sys.modules[MODULE] = stand_in
