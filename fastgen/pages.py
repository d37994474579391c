"""Converts Markdown to one self-contained HTML page: the page contains its pictures."""

import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path

STYLE = """body{max-width:52em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ccc;
text-align:left;vertical-align:top}pre,code{background:#f4f4f4;font-size:90%}pre{padding:.8em;overflow-x:auto}"""
INLINE = (
    (r"!\[([^]]*)\]\(([^)]+)\)", r'<img alt="\1" src="\2">'),
    (r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>'),
    (r"\*\*(.+?)\*\*", r"<b>\1</b>"),
)


def to_html(markdown: str, folder: str | Path = ".") -> str:
    """Converts the Markdown that the project's own pages use: headings, paragraphs, lists with "- ", tables, fenced
    code, pictures, links, bold text and inline code.

    Args:
        markdown: a text whose first line is its title, "# ...".
        folder: the folder that relative paths of PNGs start from. PNGs found there are embedded in the page.
    """

    def embedded(match: re.Match) -> str:
        path = Path(folder) / match[1]
        return (
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'
            if path.is_file()
            else match[0]
        )

    title = html.escape(markdown.partition("\n")[0].lstrip("# "))
    body = re.sub(r'src="([^"]+\.png)"', embedded, "\n".join(_blocks(markdown)))
    return f'<!doctype html>\n<meta charset="utf-8"><title>{title}</title>\n<style>{STYLE}</style>\n{body}\n'


def _blocks(markdown: str) -> Iterator[str]:
    """The HTML of each block. Fenced code is kept as it is; the text between is split at empty lines."""
    for number, part in enumerate(re.split(r"^```.*\n", markdown, flags=re.M)):
        if number % 2:
            yield f"<pre>{html.escape(part.rstrip())}</pre>"
            continue
        for block in re.split(r"\n\s*\n", part.strip()):
            lines = block.splitlines()
            heading = re.match(r"(#+) (.*)", block)
            if heading:
                level = len(heading[1])
                yield f"<h{level}>{_inline(' '.join([heading[2], *lines[1:]]))}</h{level}>"
            elif block.startswith("|"):
                yield "<table>" + "".join(_row(line) for line in lines if set(line) - set("|-: ")) + "</table>"
            elif block.startswith("- "):
                yield (
                    "<ul>"
                    + "".join(f"<li>{_inline(item)}</li>" for item in re.split(r"^- ", block, flags=re.M)[1:])
                    + "</ul>"
                )
            elif block:
                yield f"<p>{_inline(block)}</p>"


def _row(line: str) -> str:
    return (
        "<tr>" + "".join(f"<td>{_inline(cell.strip())}</td>" for cell in re.split(r"(?<!\\)\|", line)[1:-1]) + "</tr>"
    )


def _inline(text: str) -> str:
    """The HTML of a line of text: the patterns of INLINE are replaced outside of `code`."""
    parts = html.escape(text.replace(r"\|", "|"), quote=False).split("`")
    for number in range(0, len(parts), 2):
        for pattern, replacement in INLINE:
            parts[number] = re.sub(pattern, replacement, parts[number])
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
