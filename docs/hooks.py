"""What the site needs beside Markdown: README.md as its first page, and links that work in both places.

Links are written for who reads the repository. On the site, one to a page goes to that page, and one to a file outside
of ``docs`` becomes the file's name, or a link into the repository where ``repo_url`` says where that is.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files, config):
    """Add README.md as the page index.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a page to where they lead on the site."""
    source = "README.md" if page.file.src_uri == "index.md" else f"docs/{page.file.src_uri}"
    return LINK.sub(lambda link: _on_site(link, source, page.file.src_uri, config["repo_url"], files), markdown)


def _on_site(link, source, page, repository, files):
    target, anchor = link["target"], link["anchor"] or ""
    if not target or re.match(r"[a-z]+:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    uri = "index.md" if path == "README.md" else path.removeprefix("docs/")
    found = files.get_file_from_path(uri) or files.get_file_from_path(f"{uri}/README.md")
    if found and path.startswith(("docs", "README.md")):
        return f"{link[1]}{posixpath.relpath(found.src_uri, posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / path).exists():
        return link[0]  # and mkdocs tells of it
    if repository:
        return f"{link[1]}{repository.rstrip('/')}/blob/HEAD/{path}{anchor})"
    return f"`{path}`" if link["text"].strip("`") == path else f"{link['text']} (`{path}`)"
