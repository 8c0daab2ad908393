"""Playbook: a list of short texts that training edits item by item, so that no update rewrites all of it.

An optimizer suggests edits: ADD, UPDATE and DELETE an item, or name one as HELPFUL or HARMFUL. The edits of all
proposals of a step are combined without a model: `combine` depends on the proposals and their order only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.agents import parameters as typed_values
from aggregator.agents.parameters import ParameterNode, Unfit
from aggregator.checks import check_positive
from aggregator.errors import ParameterError
from aggregator.text import list_names, shorten

ID_LENGTH = 6
"""The number of hexadecimal digits of an item's id; more if two texts share them."""

EDITS = (
    'a list of edits: {"op": "ADD", "text": ...}, {"op": "UPDATE", "id": ..., "text": ...}, '
    '{"op": "DELETE", "id": ...}, {"op": "HELPFUL", "id": ...} or {"op": "HARMFUL", "id": ...} '
    "for an item that helped or misled"
)


class Item(Struct, frozen=True, kw_only=True):
    """One entry. `id` is a digest of its first text, and does not change with the text.

    `helpful` and `harmful` count the proposals that named it so, `samples` are those that added or changed it.
    """

    id: str
    text: str
    helpful: int = 0
    harmful: int = 0
    samples: tuple[int, ...] = ()


class Edit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One suggested change. ADD needs a text, UPDATE an id and a text, the others an id."""

    op: Literal["ADD", "UPDATE", "DELETE", "HELPFUL", "HARMFUL"]
    id: str | None = None
    text: str | None = None


Items = tuple[Item, ...]


class Playbook(ParameterNode[Items]):
    """A parameter that is a list of items, as in `self.tips = Playbook(["Be brief."], limit=30)`.

    `str(playbook)` is the text for a prompt, an item a line. `limit` is the maximum number of items: those with the
    lowest `helpful - harmful` are removed first, the older of equal ones. Texts or items can be assigned. Raises
    ParameterError for anything else, ConfigError for a limit below 1.
    """

    def __init__(
        self,
        items: Iterable[str | Item] = (),
        *,
        limit: int | None = None,
        name: str | None = None,
        description: str = "",
        trainable: bool = True,
    ) -> None:
        if limit is not None:
            check_positive("limit", limit)
        self.limit = limit
        super().__init__(_as_items(items), name=name, type=Items, description=description, trainable=trainable)

    def __repr__(self) -> str:
        return f"Playbook({shorten([item.text for item in self.data])}, name={self.name!r})"

    def __str__(self) -> str:
        return "\n".join(f"- {item.text}" for item in self.data)

    def check(self, raw: Any, where: str) -> Items:
        """Return texts or items as items; `where` is the position named by the error."""
        if isinstance(raw, Sequence) and not isinstance(raw, str) and any(isinstance(item, str) for item in raw):
            raw = _as_items(raw)
        return self._prune(super().check(raw, where))

    def convert(self, raw: Any) -> Items:
        """Return the items after the suggested edits of the current ones; raises ParameterError for an invalid edit."""
        if isinstance(raw, tuple) and all(isinstance(item, Item) for item in raw):
            return self.check(raw, self.name)
        where = f"$.suggestion.{self.py_name}"
        try:
            edits = typed_values.convert(raw, list[Edit])
            return self._prune(_apply(self.data, edits))
        except Unfit as unfit:
            raise ParameterError(f"{unfit.reason} - at {where}{unfit.path}") from None

    def combine(self, before: Items, proposed: Sequence[tuple[Items, float, Sequence[int]]]) -> Items:
        """Return the items after the edits of several proposals, each (items, weight, sample ids), in their order.

        New items are appended in the order of the proposals, one of equal text once. If an item has several new texts,
        the one with the most weight wins, of equal ones the earlier. An item is deleted unless a proposal with as much
        weight changes it or calls it helpful. Counts add up.
        """
        known = {item.id: item for item in before}
        added: dict[str, Item] = {}
        texts: dict[str, dict[str, tuple[float, list[int]]]] = {}
        against, in_favour = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0.0)
        counts: dict[str, list[int]] = {}
        for items, weight, samples in proposed:
            for missing in known.keys() - {item.id for item in items}:
                against[missing] += weight
            for item in items:
                old = known.get(item.id)
                helpful, harmful = counts.setdefault(item.id, [0, 0])
                if old is None:
                    found = added.setdefault(item.id, replace(item, helpful=0, harmful=0, samples=()))
                    added[item.id] = replace(found, samples=_union(found.samples, samples))
                    counts[item.id] = [helpful + item.helpful, harmful + item.harmful]
                    continue
                counts[item.id] = [helpful + item.helpful - old.helpful, harmful + item.harmful - old.harmful]
                if item.text != old.text:
                    total, sources = texts.setdefault(item.id, {}).setdefault(item.text, (0.0, []))
                    texts[item.id][item.text] = (total + weight, [*sources, *samples])
                if item.text != old.text or item.helpful > old.helpful:
                    in_favour[item.id] += weight
        kept: list[Item] = []
        for item in before:
            if against[item.id] > in_favour[item.id]:
                continue
            text, samples = item.text, item.samples
            if changed := texts.get(item.id):
                text = max(changed, key=lambda new: changed[new][0])
                samples = _union(samples, changed[text][1])
            kept.append(replace(item, text=text, samples=samples))
        counted = [
            replace(item, helpful=item.helpful + counts[item.id][0], harmful=item.harmful + counts[item.id][1])
            if item.id in counts
            else item
            for item in (*kept, *added.values())
        ]
        return self._prune(tuple(counted))

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of a suggestion: a list of edits."""
        schema = typed_values.schema(list[Edit])
        return schema | {"description": self.description} if self.description else schema

    def describe(self) -> dict[str, Any]:
        """Return this parameter's description for a prompt."""
        return super().describe() | {"value": msgspec.to_builtins(self.data), "type": EDITS}

    def _prune(self, items: Items) -> Items:
        if self.limit is None or len(items) <= self.limit:
            return items
        ranked = sorted(range(len(items)), key=lambda i: (items[i].harmful - items[i].helpful, -i))
        kept = set(ranked[: self.limit])
        return tuple(item for i, item in enumerate(items) if i in kept)


def _as_items(given: Iterable[Any]) -> Items:
    if isinstance(given, str):
        raise ParameterError(f"Expected a list of texts, got the text {shorten(given)}; write Playbook([...])")
    items: list[Any] = []
    for item in given:
        items.append(_item(item, {one.id for one in items if isinstance(one, Item)}) if isinstance(item, str) else item)
    return tuple(items)


def _item(text: str, taken: Iterable[str]) -> Item:
    """Return a new item; its id has more digits if another text has the same ones."""
    digest, length = sha256(text.encode(errors="backslashreplace")).hexdigest(), ID_LENGTH
    while digest[:length] in taken:
        length += 1
    return Item(id=digest[:length], text=text)


def _apply(items: Items, edits: Sequence[Edit]) -> Items:
    """Return the items after edits in order; raises Unfit for an incomplete edit and an unknown item."""
    found = {item.id: item for item in items}
    for i, edit in enumerate(edits):
        if edit.op == "ADD":
            text = _text(edit, i)
            if all(item.text != text for item in found.values()):
                new = _item(text, found)
                found[new.id] = new
            continue
        item = found.get(edit.id or "")
        if item is None:
            raise Unfit(
                f"Expected the id of an item ({list_names(list(found)) or 'there are none'}), got {edit.id!r}",
                f"[{i}].id",
            )
        if edit.op == "UPDATE":
            found[item.id] = replace(item, text=_text(edit, i))
        elif edit.op == "DELETE":
            del found[item.id]
        elif edit.op == "HELPFUL":
            found[item.id] = replace(item, helpful=item.helpful + 1)
        else:
            found[item.id] = replace(item, harmful=item.harmful + 1)
    return tuple(found.values())


def _text(edit: Edit, i: int) -> str:
    if edit.text is None or not edit.text.strip():
        raise Unfit(f"Expected a text to {edit.op}, got {edit.text!r}", f"[{i}].text")
    return edit.text


def _union(samples: Sequence[int], more: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({*samples, *more}))
