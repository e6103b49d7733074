"""The catalog as a file adds to it: what the shop says of its items stays, what it does not say is filled in.

A file of events is old, and the shop may feed its catalog by itself: an item that was taken out of it stays out, and
a record whose schema is not known here is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from streaming.log import Log
from streaming.schemas import ITEM, SchemaError

_BATCH: Final = 10_000
_POLL_S: Final = 1.0
_FIELDS: Final = ("category", "brand", "price")


class Decoder(Protocol):
    """The part of streaming.schemas.Codec that is needed here."""

    def decode(self, data: bytes, /) -> tuple[str, dict[str, Any]]:
        """The record's schema and its fields."""


class _Item(NamedTuple):
    record: Mapping[str, Any] | None  # as it stands; None: not to be written
    said: frozenset[str]  # fields that the catalog had from elsewhere


class ImportCatalog:
    """The newest record of each item, in the topic and by the file.

    >>> from streaming.schemas import Codec
    >>> catalog = ImportCatalog(Codec())
    >>> catalog.tell("cup", {"category": "Mugs", "brand": None, "price": 9.0})
    {'item_id': 'cup', 'category': 'Mugs', 'price': 9.0}
    >>> catalog.tell("cup", {"category": "Mugs", "brand": None, "price": None})
    """

    def __init__(self, codec: Decoder) -> None:
        self._codec = codec
        self._stored: dict[str, bytes | None] = {}  # of items that the file did not name yet; None: taken out
        self._items: dict[str, _Item] = {}  # of those that it did: both grow with the catalog, not the log

    def read(self, log: Log, topic: str) -> None:
        """Take in all that the topic holds now. Raises: LogError."""
        bounds = log.bounds(topic)
        ends = {p: b.high for p, b in bounds.items() if b.low < b.high}
        if not ends:
            return
        reader = log.reader(topic, {p: bounds[p].low for p in ends}, keys=True)
        try:
            while any(at < ends[p] for p, at in reader.position().items()):
                batch = reader.poll(_BATCH, _POLL_S)
                for i, key in enumerate(batch.keys or ()):
                    self._stored[(key or b"").decode(errors="replace")] = batch.value(i)
        finally:
            reader.close()

    def tell(self, item_id: str, told: Mapping[str, Any]) -> dict[str, Any] | None:
        """The item's new record, if this says more of it than is known; told: category, brand and price, or None."""
        record, said = self._items.get(item_id) or self._first(item_id)
        if record is None:
            return None
        news = {
            name: value
            for name, value in told.items()
            if name not in said and value is not None and value != record.get(name)
        }
        if news:
            record = {**record, **news}
        self._items[item_id] = _Item(record, said)
        return dict(record) if news else None

    def _first(self, item_id: str) -> _Item:
        """The item as the topic has it."""
        if item_id not in self._stored:
            return _Item({"item_id": item_id}, frozenset())
        value = self._stored.pop(item_id)
        try:
            name, record = self._codec.decode(value) if value is not None else ("", {})
        except SchemaError:
            name, record = "", {}
        if name != ITEM or record["item_id"] != item_id:
            self._items[item_id] = _Item(None, frozenset())
            return self._items[item_id]
        return _Item(record, frozenset(name for name in _FIELDS if record[name] is not None))
