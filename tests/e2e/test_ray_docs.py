"""The three modes as docs/ray.md shows them, on simulated engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ray_support import prompts

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

DOCS = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
BEGINNING, *MODES = re.findall(r"^```python\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["simple", "manual", "integrated"])
def test_the_mode_as_shown(ray_node, number, capsys):
    assert len(MODES) == 3
    names: dict[str, Any] = {**prompts(4)}
    assert "ray.init()\n" in BEGINNING  # done by the fixture
    exec(BEGINNING.replace("ray.init()\n", ""), names)
    names["config"] |= {"engine": "sim", "max_new_tokens": 4, "sim_cfg": {"time_scale": 0.1}}
    try:
        exec(MODES[number], names)
    finally:
        names["cluster"].shutdown()
    results = names.get("result") or names.get("results")
    if number == 0:
        assert results["generation_lengths"].tolist() == [4] * 4
    elif number == 1:
        assert [int(result["generation_lengths"][0]) for result in results] == [4] * 4
    else:
        assert capsys.readouterr().out.count("'output_ids'") == 4
