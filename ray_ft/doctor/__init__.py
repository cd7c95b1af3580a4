"""Whether a cluster is fit for a recipe: what each node says of itself, and what follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_ft.doctor.finding import Finding, Severity, worst

if TYPE_CHECKING:
    from ray_ft.recipe import Recipe
    from ray_ft.view import View

__all__ = ["Finding", "Severity", "examine", "quick", "worst"]

# The examination is imported where it is called: nodes that are asked import this package too, and should not wait.


def examine(recipe: Recipe | None, view: View, *, quick: bool = False) -> list[Finding]:
    """Look at the connected cluster, or at this machine alone where none is connected.

    Args:
        recipe: what shall run there; None: only what needs no recipe is looked at.
        quick: only what takes a second or two.

    Returns:
        What was found, the worst first.
    """
    from ray_ft.doctor import checkup

    return checkup.examine(recipe, view, quick=quick)


def quick(recipe: Recipe, view: View) -> None:
    """What `train` and `tune` look at themselves, once connected; says in lines what is not well.

    Room for workers is not among it: they ask for that first, as it needs no answer of a node.

    Raises:
        ResourceError: of all that would make the run fail.
    """
    from ray_ft.doctor import checkup

    checkup.quick(recipe, view)
