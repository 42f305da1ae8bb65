"""A page in one file: the template, style and scripts of ``assets/`` with the data in them. It loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dataparams.report.files import replacing


def embedded_json(value: Any) -> str:
    """JSON that can stand in a ``<script>`` element: no text of the data can close it or open a comment.

    Raises:
        ValueError: NaN or an infinity, which JSON cannot hold.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: also U+2028 is escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(kind: str, data: Mapping[str, Any]) -> str:
    """The page ``"report"`` or ``"compare"``.

    Args:
        kind: which script draws it.
        data: JSON values; ``title`` names the page.
    """
    assets = files("dataparams.report").joinpath("assets")
    scripts = "\n".join(assets.joinpath(name).read_text("utf-8") for name in ("charts.js", f"{kind}.js"))
    parts = {
        "title": escape(str(data["title"])),
        "style": assets.joinpath("page.css").read_text("utf-8"),
        "body": assets.joinpath(f"{kind}.html").read_text("utf-8"),
        "data": embedded_json(data),
        "script": scripts,
    }
    template = assets.joinpath("page.html").read_text("utf-8")
    pieces = template.split("%%")  # text, name, text, name, ..., text: nothing in a part is looked at again
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def write_page(path: Path | str, kind: str, data: Mapping[str, Any]) -> Path:
    """Write :func:`render` whole or not at all; returns the path."""
    page = render(kind, data)
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return Path(path)
