"""A page that needs nothing else, neither the network nor a script, and the cards on it."""

from collections.abc import Iterable
from html import escape

from fedapp.report.style import CSS


def document(title: str, body: str) -> str:
    """The whole page; `body` is HTML. It may show pictures that are in it, and load nothing."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        """content="default-src 'none';style-src 'unsafe-inline';img-src data:">"""
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def tile(name: str, value: str, beside: str) -> str:
    """One number, and what to know of it."""
    return f'<div class="card tile"><h2>{name}</h2><p>{value}</p><small>{escape(beside)}</small></div>'


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they come to."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="card"><h3>{title}</h3><table>{body}</table></div>'
