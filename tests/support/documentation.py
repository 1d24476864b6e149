"""What the documentation says: README.md and the pages in docs/."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]


def read_pages() -> str:
    """README and docs, one after the other."""
    return "\n".join(page.read_text() for page in PAGES)


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of a language in README and docs, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)\n```$", read_pages(), re.MULTILINE | re.DOTALL)


def large_commands() -> dict[str, str]:
    """The commands of docs/large_models.md, by the name of the configuration file that stands before each."""
    page = (REPOSITORY / "docs/large_models.md").read_text()
    found = re.findall(r"`configs/(\w+)\.json`(?:(?!```).)*?\n```bash\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    return dict(found)


def headings(page: str) -> list[str]:
    """The anchors that GitHub gives to the headings of a page: its text without code blocks."""
    found = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


def without_code(page: str) -> str:
    """The text of a page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))
