"""The catalog as arrays by vocabulary id: what each item is, and whether it may be recommended.

Its topic is compacted, so reading it from the beginning gives the catalog as it stands. An item whose tombstone
was compacted away with it is not in the topic any more: whoever goes on from a checkpoint says by `expect` what it
knew, and what does not come again is gone. Likewise where the topic was made anew meanwhile: `Renewal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.columns import Reason
from streaming.interning import Vocabulary, hash_string
from streaming.log import Bounds, RecordBatch
from streaming.schemas import ITEM, MAX_VECTOR, Codec, SchemaError, prefix_of
from streaming.transitions import Rejects

MAX_ID_BYTES: Final = 1024
MAX_PRICE: Final = 1e9
QUIET_S: Final = 30.0  # after which a catalog that was made anew counts as written


class Renewal:
    """Notices when a catalog's topic that was made anew has been written, so that what it does not name is gone: once
    it holds something, all of that was read, and nothing came for QUIET_S. A shop writes its items one by one."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """See `Catalog.begin_anew` and `end_anew`."""
        self._begin, self._end = begin, end
        self._on = False
        self._high: dict[int, int] = {}  # where it ended at the last look,
        self._since_s = 0.0  # and since when

    def begin(self) -> None:
        """The topic is another one than before."""
        self._on, self._high = True, {}
        self._begin()

    def look(self, bounds: Mapping[int, Bounds], position: Mapping[int, int], now_s: float) -> None:
        """bounds: of the topic; position: the next offset to be read, of each partition."""
        if not self._on:
            return
        high = {p: b.high for p, b in bounds.items()}
        if high != self._high:
            self._high, self._since_s = high, now_s
        some = any(b.low < b.high for b in bounds.values())
        read = all(position.get(p, b.low) >= b.high for p, b in bounds.items())
        if some and read and now_s - self._since_s >= QUIET_S:
            self._on = False
            self._end()


class Record(NamedTuple):
    """What one record of the topic says."""

    item_id: str
    item: Mapping[str, Any] | None  # None: it was taken out


class Catalog:
    """Items by vocabulary id, as many rows as the largest id met asks for; row 0 is the unknown item.

    >>> catalog = Catalog(Codec(), Vocabulary())
    >>> catalog.known.tolist(), catalog.version
    ([False], 0)
    """

    def __init__(self, codec: Codec, vocabulary: Vocabulary) -> None:
        self._codec = codec
        self._vocabulary = vocabulary
        self.version = 0  # changes whenever an array does
        self.known = np.zeros(1, np.bool_)  # [N] is in the catalog
        self.gone = np.zeros(1, np.bool_)  # [N] was taken out of it; what it was stays known
        self.recorded = np.zeros(1, np.bool_)  # [N] a record said what it is; not so of all that is gone
        self.in_stock = np.zeros(1, np.bool_)  # [N] as the catalog says; False where it says nothing
        self.category = np.zeros(1, np.uint64)  # [N] hash, 0 unknown
        self.brand = np.zeros(1, np.uint64)  # [N] hash, 0 unknown
        self.price = np.full(1, np.nan, np.float32)  # [N] NaN unknown
        self.vector = np.zeros((1, 1), np.float32)  # [N, longest vector met]
        self._doubted = np.zeros(0, np.bool_)  # [<= N] see `begin_anew`

    def apply(self, batch: RecordBatch) -> Rejects:
        """Take in records of the catalog's topic, read with their keys; returns those that cannot be used.

        Raises: RegistryUnavailable where a record's schema cannot be asked for now; then nothing was taken in.
        """
        records, rejects = self.read(batch)
        self.put(records)
        return rejects

    def read(self, batch: RecordBatch) -> tuple[list[Record], Rejects]:
        """What `apply` is to take in, and what cannot be used; nothing is taken in yet. Raises: as `apply`."""
        keys = batch.keys
        if keys is None:
            raise ValueError("the catalog's reader must return keys: a tombstone is nothing but a key")
        items = [self._read(batch.value(i), keys[i]) for i in range(len(batch))]
        bad = [(i, item) for i, item in enumerate(items) if isinstance(item, Reason)]
        good = [
            Record((key or b"").decode(), item)
            for key, item in zip(keys, items, strict=True)
            if not isinstance(item, Reason)
        ]
        rejects = Rejects(np.array([i for i, _ in bad], np.int64), np.array([r for _, r in bad], np.uint8))
        return good, rejects

    def put(self, records: Sequence[Record]) -> None:
        """Take in what was read. In order, so that the newest record of an item is the one that stays."""
        if not records:
            return
        ids = self._vocabulary.intern_all([record.item_id for record in records])
        widest = max(len(record.item["vector"]) if record.item else 1 for record in records)
        self._reserve(int(ids.max()) + 1, widest)
        for i, (_, item) in zip(ids.tolist(), records, strict=True):
            if i:  # 0: the vocabulary is full, and counts what it refuses
                self.known[i] = item is not None
                self.gone[i] = item is None
                if i < len(self._doubted):
                    self._doubted[i] = False
                if item is not None:
                    self._describe(i, item)
        self.version += 1

    def described(
        self, item_ids: Sequence[str], items: Sequence[Mapping[str, Any]]
    ) -> tuple[npt.NDArray[np.int64], Catalog]:
        """Items that came with a request, as a catalog of their own: their vocabulary ids [M], which must be interned,
        and row by row what is said of them; `known` says which of them this catalog has or had, or are to stay unknown.

        items: category, brand and price may be None, vector empty (Candidate of proto/decision.avsc).
        """
        ids = self._vocabulary.ids(item_ids).astype(np.int64)
        told = Catalog(self._codec, self._vocabulary)
        told._reserve(len(items), max((len(item["vector"]) for item in items), default=1))
        for row, item in enumerate(items):
            told._describe(row, {"in_stock": True, **item})
        mine = self.known | self.gone
        told.known = (ids == 0) | (ids < len(mine)) & mine[np.minimum(ids, len(mine) - 1)]  # 0: has no room
        return ids, told

    def expect(self, known: npt.NDArray[np.integer]) -> None:
        """These vocabulary ids were in the catalog once: they count as gone until their records come again."""
        if len(known):
            self._reserve(int(known.max()) + 1, 1)
            self.gone[known] = ~self.known[known]
            self.version += 1

    def begin_anew(self) -> None:
        """The topic was made anew, and is read from its beginning: see `Renewal`."""
        self._doubted = self.known.copy()

    def end_anew(self) -> None:
        """What it did not say anything of since `begin_anew`, and is still known, is gone."""
        absent = np.flatnonzero(self._doubted)
        self._doubted = np.zeros(0, np.bool_)
        if len(absent):
            self.known[absent], self.gone[absent] = False, True
            self.version += 1

    def met(self) -> npt.NDArray[np.int64]:
        """Vocabulary ids that are or were in the catalog, for `expect`."""
        return np.flatnonzero(self.known | self.gone)

    def _read(self, value: bytes | None, key: bytes | None) -> Mapping[str, Any] | Reason | None:
        """The item's fields; None for a tombstone; the Reason where the record cannot be used."""
        if not key or len(key) > MAX_ID_BYTES:
            return Reason.EMPTY_STRING if not key else Reason.TOO_LONG
        if value is None:
            return None if _is_utf8(key) else Reason.BAD_UTF8
        try:
            name, item = self._codec.decode(value)
        except SchemaError:
            prefix = prefix_of(value)
            if not value:
                return Reason.EMPTY
            if prefix is None:
                return Reason.BAD_FRAME
            return Reason.UNREADABLE if self._codec.resolve(prefix) else Reason.UNKNOWN_SCHEMA
        if name != ITEM:
            return Reason.UNKNOWN_SCHEMA
        return _trouble(item, key) or item

    def _describe(self, i: int, item: Mapping[str, Any]) -> None:
        self.recorded[i] = True
        self.in_stock[i] = item["in_stock"]
        self.category[i] = hash_string(item["category"] or "")
        self.brand[i] = hash_string(item["brand"] or "")
        self.price[i] = np.nan if item["price"] is None else item["price"]
        self.vector[i] = 0.0
        self.vector[i, : len(item["vector"])] = item["vector"]

    def _reserve(self, rows: int, width: int) -> None:
        """Room for so many rows, and for vectors of this width."""
        have, wide = self.vector.shape
        rows = max(have, rows)
        if (rows, max(width, wide)) == (have, wide):
            return
        more = rows - have
        for name in ("known", "gone", "recorded", "in_stock", "category", "brand"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros(more, array.dtype)]))
        self.price = np.concatenate([self.price, np.full(more, np.nan, np.float32)])
        vector = np.zeros((rows, max(width, wide)), np.float32)
        vector[:have, :wide] = self.vector
        self.vector = vector


def _is_utf8(key: bytes) -> bool:
    try:
        return "\0" not in key.decode()
    except UnicodeDecodeError:
        return False


def _trouble(item: Mapping[str, Any], key: bytes) -> Reason | None:
    """What is wrong with an item by the bounds of proto/item.avsc."""
    if item["item_id"].encode() != key:
        return Reason.OTHER_KEY
    if "\0" in item["item_id"]:
        return Reason.BAD_UTF8
    price, vector = item["price"], np.asarray(item["vector"], np.float64)
    if len(vector) > MAX_VECTOR:
        return Reason.TOO_LONG
    if not np.isfinite(vector).all() or (price is not None and not 0.0 <= price <= MAX_PRICE):
        return Reason.BAD_NUMBER
    return None
