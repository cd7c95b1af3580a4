"""transformers without packages that it would import and nothing here uses: scikit-learn and SciPy.

Its model classes bring in assisted generation, which wants scikit-learn for a threshold, and the losses of object
detectors, which want SciPy; a tokenizer, or a config such as Gemma 3's, brings the model classes in already. That is a
third of what building a model computes (seen: 1.2 of 3.4 s for a tiny one), in each worker and with every start.
"""

from __future__ import annotations


def without_unused() -> None:
    """Have transformers find neither in this process; to be called before anything of it is imported by name."""
    from transformers import utils

    utils.is_sklearn_available = utils.is_scipy_available = lambda: False
