"""Names of repositories of the Hugging Face Hub."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
