"""Make a report's page: one HTML file that contains its style, script and data, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

from streamer.report.page_data import page_data
from streamer.report.subject import Collection, Subject
from streamer.report.words import certificates, headline, sentences, suggestion, title

SCRIPTS = ("draw.js", "findings.js", "page.js")

SIGN = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="streamer report">\n'
"""Beginning of every page, which identifies it."""


def make_page(subject: Subject | Collection) -> bytes:
    """Make a report's page. It contains no times or paths, so the same inputs give the same bytes.

    All text from the inputs is escaped, or set as text by the script; a policy in the page prevents any other script from running.
    """
    template, style, *scripts = (
        files("streamer.report").joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "\n" + "\n".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    said, next_ = headline(subject)
    lines = [f'<p class="verdict">{html.escape(said)}</p>', *map(_command, next_)]
    if isinstance(subject, Subject):
        if subject.findings is not None:
            lines += [f"<p>{html.escape(line)}</p>" for line in subject.findings.warnings]
        if subject.evaluation is not None:
            lines.append(_list(suggestion(subject.evaluation)))
        lines += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences(subject)]
        if proven := certificates(subject):
            lines.append(f'<p class="certificates">{html.escape(proven)}</p>')
    page = Template(template).substitute(
        digest=digest, title=html.escape(title(subject)), style=style, text="\n".join(lines), data=embed(page_data(subject)),
        script=script.removeprefix("\n"),
    )  # fmt: skip
    return (SIGN + page).encode("utf-8")


def _list(lines: Sequence[str]) -> str:
    """Format an evaluation's suggestion: reasons as a list, commands as code."""
    found = [(line, re.match(r"([a-z ]+): (streamer .+)", line)) for line in lines]
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line, command in found if command is None)
    return "\n".join([f'<ul id="suggestion">\n{items}</ul>', *(_command((c[1], c[2])) for _, c in found if c)])


def _command(command: tuple[str, str]) -> str:
    """Format a command to copy, below its purpose."""
    label, *words = (html.escape(word) for word in (command[0], *command[1].split(" ")))
    code = " ".join(f"<span>{word}</span>" for word in words)
    return f'<p class="note">{label[:1].upper()}{label[1:]}:</p>\n<pre class="command"><code>{code}</code></pre>'


def embed(tree: dict[str, Any]) -> str:
    """Serialise JSON for a script element, so that it cannot end the element or begin markup."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
