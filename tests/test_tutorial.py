"""docs/tutorial.md: its cells run as they stand, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
from latentds_tools import cli

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
CELL = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs_and_its_classifier_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = CELL.findall(PAGE.read_text())
    names: dict[str, object] = {}
    for language, text in cells:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        for line in text.splitlines():
            with pytest.raises(SystemExit, match="0"):
                cli.main(shlex.split(line)[1:])
    assert {language for language, _ in cells} == {"python", "bash"}
    assert names["count"] == 63 and names["accuracy"] > 0.8
    assert list(names["train"].classes) == ["dark", "light"]
