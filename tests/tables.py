"""Tables of the docs that tests make: compared with the page, and with DUALPARAL_WRITE_TABLES=1 written into it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITE = "DUALPARAL_WRITE_TABLES"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as the docs write it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def check_page(page: str, table: str) -> None:
    """Fail unless `page` has `table`, or write it there in place of the one with the same head."""
    path, head = DOCS / page, table.partition("\n")[0]
    text = path.read_text(encoding="utf-8")
    if os.environ.get(WRITE):
        text, number = re.subn(rf"(?m)^{re.escape(head)}\n(?:\|.*\n)*", lambda _: f"{table}\n", text)
        assert number == 1, f"{page} has {number} tables that begin with {head}"
        path.write_text(text, encoding="utf-8")
    assert f"{table}\n" in text, f"docs/{page} is behind: {WRITE}=1 pytest tests/model writes its tables\n{table}"
