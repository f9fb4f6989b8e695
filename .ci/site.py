"""Hooks of mkdocs.yml: the pages outside docs/api, at their paths in the repository, and what they link to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "benchmarks/*.md", "small/*/RESULTS.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")
START = "README.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages, and the files that they link to."""
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    linked = {
        (page.parent / target).resolve()
        for page in pages
        for _, _, target, _ in LINK.findall(page.read_text(encoding="utf-8"))
    }
    for path in dict.fromkeys([*pages, *sorted(linked - set(pages))]):
        if path.is_file() and path.is_relative_to(ROOT):
            name = str(path.relative_to(ROOT))
            files.append(File.generated(config, "index.md" if name == START else name, abs_src_path=str(path)))
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            files.append(File.generated(config, f"docs/api/{file.src_uri}", abs_src_path=file.abs_src_path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to README.md to the start page, and take those to folders away, which a site does not list."""
    folder = ROOT if page.file.src_uri == "index.md" else (ROOT / page.file.src_uri).parent

    def led(match: re.Match[str]) -> str:
        target = (folder / match[3]).resolve()
        if target == ROOT / START:
            depth = len(folder.relative_to(ROOT).parts)
            return f"{match[1]}[{match[2]}]({'../' * depth}index.md{match[4]})"
        return match[2] if target.is_dir() else match[0]

    return LINK.sub(led, markdown)
