"""Every token that ends an answer reaches the export: those of the base's generation_config and the template's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_ft.demo import DemoPaths
from ray_ft.export.checks import text


@pytest.mark.parametrize(("listed", "expected"), [([1, 9], [1, 5, 9]), (9, [1, 5, 9]), (1, [1, 5]), (None, [1, 5])])
def test_stop_ids_of_the_base_are_kept_beside_the_templates(
    demo: DemoPaths, tmp_path: Path, listed: Any, expected: list[int]
) -> None:
    base = Path(shutil.copytree(demo.base, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({} if listed is None else {"eos_token_id": listed}))
    assert text.stop_ids_of(str(base)) == expected
