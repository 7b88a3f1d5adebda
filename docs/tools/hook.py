"""What mkdocs does for this site besides: equations as MathML, pages from outside docs/, and links to files that are no pages.

Equations are written in LaTeX between dollars, as GitHub shows them too; browsers draw MathML without any script.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.files import File

# Files of the repository that are pages as well, where they exist: path -> page.
OUTSIDE = {"README.md": "overview.md", "launch/README.md": "launch.md", "CONTRIBUTING.md": "contributing.md"}
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


class Links(Treeprocessor):
    """Links and pictures by their place in the repository -> by that in the site; a link out of it leaves its text, as code."""

    page = ""  # path in the repository of the file that is being rendered

    def run(self, root):
        for parent in root.iter():
            for link in parent.findall("a"):
                self._turn(link, "href")
            for picture in parent.findall("img"):
                self._turn(picture, "src")

    def _turn(self, link, name):
        target, hash_mark, anchor = link.get(name, "").partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.page), target))
        page = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None:
            link.tag = "code" if not len(link) else "span"
            link.attrib.clear()
        else:
            here = posixpath.dirname(OUTSIDE.get(self.page, self.page.removeprefix("docs/")))
            link.set(name, posixpath.relpath(page, here or ".") + hash_mark + anchor)


class LinksExtension(Extension):
    def extendMarkdown(self, md):
        md.treeprocessors.register(Links(md), "repository_links", 10)  # after inline patterns (20), before mkdocs' own (0)


def on_config(config):
    config.markdown_extensions.append(LinksExtension())
    return config


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for path, page in OUTSIDE.items():
        if (root / path).exists():
            files.append(File.generated(config, page, content=(root / path).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    pages = {page: path for path, page in OUTSIDE.items()}
    Links.page = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return markdown


def on_page_content(content, page, config, files):
    """Raises ValueError where the converter has passed a command on that it does not know."""
    return EQUATION.sub(lambda found: _mathml(found[2], "inline" if found[1] == "span" else "block", page.file.src_uri), content)


def _mathml(latex: str, display: str, where: str) -> str:
    latex = html.unescape(latex).strip()
    made = convert(latex.replace("{aligned}", "{align*}"), display=display)
    if re.search(r">\s*(&amp;|&|\\\w*)\s*<", made):
        raise ValueError(f"{where}: an equation that cannot be shown: {latex}")
    return f'<div class="equation">{made}</div>' if display == "block" else made
