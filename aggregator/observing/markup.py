"""HTML that is escaped by construction: text is text, and only `tag` makes markup.

Styles stand in the elements, colours are few and readable on light and dark paper, and there are no scripts: what a
model wrote is shown in notebooks as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from re import split

GOOD, BAD, QUIET = "#2a9d56", "#e0524a", "#8a8f98"
"""Readable on white and on black."""

_LINE = "1px solid rgba(138,143,152,.35)"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;text-align:left"
_CELL = f"padding:3px 10px 3px 0;text-align:left;vertical-align:top;border-bottom:{_LINE}"
_MOST_WORDS = 1_500
"""Beyond it a comparison word by word takes longer than a look at both texts."""


class Html(str):
    """Markup, as against text that is yet to be escaped."""

    __slots__ = ()


def tag(name: str, *content: str, style: str = "", **attributes: str) -> Html:
    """Return an element; content that is not Html is escaped.

    >>> tag("b", "1 < 2", tag("i", "&"))
    '<b>1 &lt; 2<i>&amp;</i></b>'
    """
    given = {"style": style, **attributes} if style else attributes
    facts = "".join(f' {key.replace("_", "-")}="{escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{facts}>{joined(content)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Return parts one after the other, those that are not Html escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(*parts: str) -> Html:
    """Return parts as one block, in the notebook's own font and colour."""
    return tag("div", *parts, style="line-height:1.5;max-width:72em")


def heading(*facts: str) -> Html:
    """Return a line of facts, the first of them in bold."""
    first, *rest = [fact for fact in facts if fact]
    return tag("div", tag("b", first), *(joined((" · ", fact)) for fact in rest))


def text(value: str) -> Html:
    """Return text in its own lines."""
    return tag("span", value, style=_TEXT)


def coloured(value: str, colour: str) -> Html:
    """Return a few words in a colour."""
    return tag("span", value, style=f"color:{colour}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table of plain lines."""
    top = tag("tr", *(tag("th", name, style=f"{_CELL};font-weight:600;color:{QUIET}") for name in head))
    body = [tag("tr", *(tag("td", cell, style=_CELL) for cell in row), style="background:none") for row in rows]
    shown = [tag("thead", top)] if any(head) else []
    return tag("table", *shown, tag("tbody", *body), style="border-collapse:collapse;margin:6px 0;font-size:inherit")


def folded(title: str, *content: str, opened: bool = False) -> Html:
    """Return content that a click opens."""
    summary = tag("summary", title, style=f"cursor:pointer;color:{QUIET}")
    return tag("details", summary, *content, **({"open": ""} if opened else {}))


def compared(before: str, after: str) -> Html:
    """Return a text as it became, with what was struck out and what was put in.

    >>> [compared("a b", after).count("<del") for after in ("a b", "a c", "a b c")]
    [0, 1, 0]
    """
    old, new = split(r"(\s+)", before), split(r"(\s+)", after)
    if len(old) + len(new) > _MOST_WORDS:
        return joined((_struck(before), "\n\n", _put_in(after)))
    parts: list[str] = []
    for what, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            parts.append("".join(new[k:m]))
        else:
            parts += [_struck("".join(old[i:j])), _put_in("".join(new[k:m]))]
    return tag("span", *(part for part in parts if part), style=_TEXT)


def _struck(words: str) -> Html:
    return tag("del", words, style=f"color:{BAD};margin-right:.25em;{_TEXT}") if words else Html()


def _put_in(words: str) -> Html:
    return tag("ins", words, style=f"color:{GOOD};text-decoration:none;font-weight:600;{_TEXT}") if words else Html()
