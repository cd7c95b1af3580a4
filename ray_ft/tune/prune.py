"""Which checkpoints of a sweep are deleted: those of trials that lost, and those that no trial can still go on from.

What a trial was and did stays: recipe, metrics, logs, trial.json. Checkpoints go marker first, so that half of one
never counts. What storage refuses is said and stays for the next time; a sweep does not end for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ray_ft import paths
from ray_ft.errors import CheckpointError, StorageError, first_line
from ray_ft.train import checkpoint
from ray_ft.tune.journal import Sweep, Trial

Say = Callable[[str], None]


def losers(sweep: Sweep, keep: int, say: Say, needed: Collection[str] = (), busy: Collection[int] = ()) -> list[Trial]:
    """Delete all checkpoints of trials that are over, except of the best `keep` of them, and mark those trials.

    Trials that went to the end are better than all that were stopped, so a stopped one keeps its checkpoints only until
    `keep` have finished: till then it may still be the sweep's best. Failed ones keep none.

    Args:
        needed: locations of checkpoints that another trial is about to take over; a trial with one of them waits.
        busy: trials whose process is not gone, and may still save.

    Returns:
        the trials that have none left now.
    """
    over = [trial for trial in sweep.ranked() if trial.over]
    kept = {trial.number for trial in over[:keep]}
    pruned = []
    for number, trial in sorted(sweep.trials.items()):
        if number in busy or number in kept or not trial.over or trial.pruned:
            continue
        if _emptied(sweep, trial, say, needed):
            trial.pruned = True
            sweep.save_trial(trial)
            pruned.append(trial)
    return pruned


def _emptied(sweep: Sweep, trial: Trial, say: Say, needed: Collection[str]) -> bool:
    folder = sweep.run_of(trial).checkpoints
    try:
        found = checkpoint.folders(folder)
        if any(location in needed for _, location in found):
            return False
        for _, location in found:
            checkpoint.delete(location, say)
        if checkpoint.folders(folder):  # it was said why
            return False
        paths.delete_dir(folder)  # with what was set aside as broken; the next trial that ends is the next attempt
    except (StorageError, OSError) as error:
        say(f"checkpoints of {trial.name} are not deleted: {first_line(error)}")
        return False
    return True


def superseded(sweep: Sweep, keep: int, needed: Collection[str], say: Say, busy: Collection[int] = ()) -> None:
    """Delete committed checkpoints of trials that are not over, beyond the newest `keep` valid ones of each.

    Training keeps all of them in a sweep that takes checkpoints over (PBT): another trial may go on from any.

    Args:
        needed: locations that stay.
        busy: trials that are left alone.
    """
    for number, trial in sorted(sweep.trials.items()):
        if trial.over or number in busy:
            continue
        try:
            _thinned(sweep.run_of(trial).checkpoints, keep, needed, say)
        except StorageError as error:
            say(f"older checkpoints of {sweep.trials[number].name} are not deleted: {first_line(error)}")


def _thinned(folder: str, keep: int, needed: Collection[str], say: Say) -> None:
    found = checkpoint.committed(folder)
    if len(found) <= keep:
        return
    valid = 0
    for _, location in reversed(found):
        if valid >= keep:
            if location not in needed:
                checkpoint.delete(location, say)
            continue
        try:
            checkpoint.verify(location)
            valid += 1
        except CheckpointError as error:
            if checkpoint.is_committed(location):  # else its own run set it aside meanwhile
                say(f"{error.what}; an older checkpoint is kept for it")
