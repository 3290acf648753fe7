"""Pages, and the code blocks in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(?:<!-- snippet: (\w+) -->\n)?^( *)```([^\n`]*)\n(.*?)^\2```", re.M | re.S)


class Block(NamedTuple):
    """One fenced block that is no directive."""

    page: str
    line: int
    language: str
    text: str
    snippet: str | None
    """Its name, where test_readme.py runs it."""
    end: int
    """Line on which it ends."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Of a block of shell: one a line, and one a part of ``a && b``; a script is one command."""
        if self.text.startswith("#!"):
            return [self.text.strip()]
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        bare = [re.sub(r"\s+#\s.*$", "", line).strip() for line in lines]
        parts = [part.strip() for line in bare if line and not line.startswith("#") for part in line.split("&&")]
        return [re.sub(r"(^|\s)\.venv/bin/", r"\1", part) for part in parts]

    def is_output_of(self, block: Block) -> bool:
        """Whether this is text right below that block."""
        return self.language == "text" and self.line - block.end <= 2


def pages() -> list[Path]:
    """All Markdown that people read, generated pages included."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    return sorted(page for page in found if not {"_build", ".ipynb_checkpoints"} & set(page.parts))


def is_notebook(page: Path) -> bool:
    """Whether the site's build runs it."""
    head = re.match(r"---\n(.*?)\n---\n", page.read_text(), re.S)
    return head is not None and ("jupytext:" in head[1] or "mystnb" in head[1])


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        snippet, indent, language, body = match.groups()
        if language.startswith("{"):
            continue
        line = text.count("\n", 0, match.start(3)) + 1
        dedented = re.sub(rf"^{indent}", "", body, flags=re.M)
        end = text.count("\n", 0, match.end()) + 1
        found.append(Block(str(page.relative_to(ROOT)), line, language.strip(), dedented, snippet, end))
    return found


def toctrees(page: Path) -> list[Path]:
    """The pages that the toctrees of a page name."""
    found: list[Path] = []
    for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
        for entry in (line.strip() for line in body.splitlines()):
            if "*" in entry:
                found += [other for other in page.parent.glob(f"{entry}.md") if other != page]
            elif entry and not entry.startswith(":"):
                found.append(page.parent / f"{entry}.md")
    return found
