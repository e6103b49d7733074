"""The catalog by vocabulary id: what records of its topic make of it, in any order and after a restart."""

import numpy as np
import pytest

from streaming.catalog import Catalog
from streaming.columns import Reason
from streaming.interning import Vocabulary, hash_string
from streaming.log import RecordBatch
from streaming.schemas import Codec

CODEC = Codec()


def batch(*records):
    """Records of the catalog's topic: (key, value), value None for a tombstone."""
    values = [value or b"" for _, value in records]
    n = len(records)
    return RecordBatch(
        partition=np.zeros(n, np.int32),
        offset=np.arange(n),
        timestamp_ms=np.zeros(n, np.int64),
        data=np.frombuffer(b"".join(values), np.uint8),
        bounds=np.cumsum([0, *(len(v) for v in values)]),
        null=np.array([value is None for _, value in records], np.bool_),
        keys=[key for key, _ in records],
    )


def item(item_id, **fields):
    return item_id.encode(), CODEC.encode_item({"item_id": item_id, **fields})


@pytest.fixture
def catalog():
    return Catalog(CODEC, Vocabulary())


def id_of(catalog, item_id):
    return catalog._vocabulary.id_of(item_id)


def test_an_item_is_described_under_its_vocabulary_id(catalog):
    catalog.apply(
        batch(item("case"), item("phone", category="phones", brand="b", price=99.5, vector=[1.0, 2.0]))
    )
    phone = id_of(catalog, "phone")
    assert (phone, catalog.known[phone], catalog.in_stock[phone]) == (2, True, True)
    assert catalog.category[phone] == hash_string("phones")
    assert catalog.price[phone] == np.float32(99.5)
    assert catalog.vector[phone].tolist() == [1.0, 2.0]
    assert np.isnan(catalog.price[1])
    assert catalog.category[1] == 0


def test_the_newest_record_of_an_item_stands(catalog):
    catalog.apply(batch(item("phone", price=1.0), item("phone", price=2.0, in_stock=False)))
    assert (catalog.price[1], catalog.in_stock[1]) == (2.0, False)


def test_a_tombstone_takes_an_item_out_and_a_record_brings_it_back(catalog):
    catalog.apply(batch(item("phone"), (b"phone", None)))
    assert (catalog.known[1], catalog.gone[1]) == (False, True)
    catalog.apply(batch(item("phone")))
    assert (catalog.known[1], catalog.gone[1]) == (True, False)


def test_a_shorter_vector_is_padded_and_a_longer_one_widens_the_table(catalog):
    catalog.apply(batch(item("a", vector=[1.0, 1.0, 1.0])))
    catalog.apply(batch(item("a", vector=[2.0]), item("b", vector=[3.0] * 5)))
    assert catalog.vector[1].tolist() == [2.0, 0, 0, 0, 0]
    assert catalog.vector[2].tolist() == [3.0] * 5


def test_what_does_not_come_again_after_a_restart_is_gone(catalog):
    catalog.apply(batch(item("a"), item("b")))
    again = Catalog(CODEC, catalog._vocabulary)
    again.expect(catalog.met())
    again.apply(batch(item("b")))  # the tombstone of a was compacted away
    assert again.gone[1:].tolist() == [True, False]
    assert again.known[1:].tolist() == [False, True]


def test_rows_never_outnumber_the_vocabulary(catalog):
    for n in range(40):
        catalog.apply(batch(item(f"item-{n}")))
        assert len(catalog.known) == len(catalog._vocabulary) + 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ((b"", b"x"), Reason.EMPTY_STRING),
        ((b"k" * 1025, b"x"), Reason.TOO_LONG),
        ((b"k", b""), Reason.EMPTY),
        ((b"k", b"hello"), Reason.BAD_FRAME),
        ((b"k", b"\xc3\x01" + b"\0" * 20), Reason.UNKNOWN_SCHEMA),
        ((b"phone", item("phone")[1][:-1]), Reason.UNREADABLE),
        ((b"phone", item("phone")[1] + b"\0"), Reason.UNREADABLE),
        ((b"other", item("phone")[1]), Reason.OTHER_KEY),
        (item("phone", price=float("nan")), Reason.BAD_NUMBER),
        (item("phone", price=-1.0), Reason.BAD_NUMBER),
        (item("phone", vector=[float("inf")]), Reason.BAD_NUMBER),
        (item("phone", vector=[0.0] * 257), Reason.TOO_LONG),
        ((b"\xff", None), Reason.BAD_UTF8),
        (
            (b"u", CODEC.encode_event({"event_id": "e", "name": "search", "user_id": "u", "timestamp": 1})),
            Reason.UNKNOWN_SCHEMA,
        ),
    ],
)
def test_a_bad_record_is_refused_by_reason_and_its_neighbours_stand(catalog, record, reason):
    rejects = catalog.apply(batch(item("before"), record, item("after")))
    assert rejects.row.tolist() == [1]
    assert Reason(rejects.reason[0]) is reason
    assert catalog.known[[id_of(catalog, "before"), id_of(catalog, "after")]].all()


def test_the_version_moves_only_when_something_changed(catalog):
    catalog.apply(batch((b"k", b"hello")))
    assert catalog.version == 0
    catalog.apply(batch(item("a")))
    assert catalog.version == 1


def test_a_reader_without_keys_is_refused(catalog):
    with pytest.raises(ValueError, match="keys"):
        catalog.apply(RecordBatch(*tuple(batch(item("a")))[:-1], keys=None))
