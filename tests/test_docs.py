"""Figures in the README are those of the result files."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quoted_table_stands_in_the_result_file():
    quoted = re.search(r"<!-- rows of (\S+); .*-->\n((?:\|.*\n)+)", README)
    file, rows = quoted.group(1), quoted.group(2).splitlines()
    measured = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert len(rows) > 4
    assert not [row for row in rows if row not in measured]


def test_every_link_and_picture_exists():
    for page in (ROOT / "README.md", ROOT / "docs/results/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_result_names_its_command_and_no_machine_path():
    files = sorted((ROOT / "docs/results").glob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"command", "commit", "date", "device", "versions", "rows"} <= content.keys()
        assert content["command"].startswith(("lococo ", "python examples/"))
        assert not re.search(r"(^|[ '\"=])/", content["command"]), file
        assert content["rows"]
