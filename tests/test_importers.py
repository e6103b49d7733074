"""Public logs, in small files of the public layouts, become events of ours."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from streaming.columns import Kind
from streaming.decoder import Decoder
from streaming.importers import (
    Bar,
    Imported,
    ImportFailed,
    ImportSettings,
    Refusal,
    _sorted_by_time,
    import_file,
    read_events,
)
from streaming.interning import Vocabulary
from streaming.log import Bounds, Log, LogFull, open_log
from streaming.schemas import Codec

CODEC = Codec()
RETAILROCKET = """timestamp,visitorid,event,itemid,transactionid
1433221332117,257597,view,355908,
1433224214164,992329,addtocart,248676,
1433221999827,111016,transaction,318965,4000
"""
TAOBAO = """1,2268318,2520377,pv,1511544070
1,2333346,2520771,fav,1511561733
100,2576651,149192,cart,1511572885
1,2268318,2520377,buy,1511544170
"""
REES46 = """event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session
2019-10-01 00:00:00 UTC,view,44600062,2103807459595387724,,shiseido,35.79,541312140,72d76fde
2019-10-01 00:00:01 UTC,cart,3900821,2053013552326770905,appliances.water_heater,,33.20,554748717,9333dfbd
2019-10-01 00:00:02 UTC,remove_from_cart,3900821,2053013552326770905,appliances.water_heater,,33.20,554748717,9333dfbd
2019-10-01 00:00:05 UTC,purchase,44600062,2103807459595387724,cosmetics,,36.00,541312140,72d76fde
"""
OTTO = """{"session":42,"events":[{"aid":15,"ts":1659304800025,"type":"clicks"}]}
{"session":42,"events":[{"aid":7,"ts":1659304904511,"type":"carts"}, {"aid":7,"ts":1659304904512,"type":"clicks"}]}
{"session":43,"events":[{"aid":7,"ts":1659304800024,"type":"orders"}]}
"""
SAMPLES = {"retailrocket": RETAILROCKET, "taobao": TAOBAO, "rees46": REES46, "otto": OTTO}
TAOBAO_HEADER = "user_id,item_id,category_id,behavior,ts\n"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = open_log(f"sqlite:///{tmp_path}/log.db")
    yield log
    log.close()


def written(tmp_path: Path, text: str, name: str = "file") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def as_parquet(tmp_path: Path, layout: str, text: str) -> Path:
    """What somebody who loaded the text with pandas would have saved."""
    path = tmp_path / "file.parquet"
    if layout == "otto":
        table = pa.Table.from_pylist([json.loads(line) for line in text.splitlines()])
    else:
        table = pa.csv.read_csv(io.BytesIO(((TAOBAO_HEADER if layout == "taobao" else "") + text).encode()))
    pq.write_table(table, path)
    return path


def records(log: Log, topic: str = "events") -> list[dict[str, Any]]:
    """All records of a topic, decoded, partition by partition."""
    bounds = log.bounds(topic)
    reader = log.reader(topic, {partition: ends.low for partition, ends in bounds.items()})
    left = sum(ends.high - ends.low for ends in bounds.values())
    found = []
    while left > 0:
        batch = reader.poll(10_000, 5.0)
        left -= len(batch)
        found += [CODEC.decode(batch.value(i) or b"")[1] for i in range(len(batch))]
        assert len(batch), f"{left} records are missing"
    reader.close()
    return found


def by_time(log: Log) -> list[dict[str, Any]]:
    return sorted(records(log), key=lambda event: (event["timestamp"], event["event_id"]))


def imported_events(layout: str, path: Path, folder: Path) -> list[dict[str, Any]]:
    """What an import of the file leaves in a log of its own."""
    folder.mkdir()
    log = open_log(f"sqlite:///{folder}/log.db")
    try:
        import_file(layout, path, log, CODEC)
        return by_time(log)
    finally:
        log.close()


def ms(event: dict[str, Any]) -> int:
    stamp = event["timestamp"]
    return stamp if isinstance(stamp, int) else round(stamp.timestamp() * 1000)


def summary(event: dict[str, Any]) -> tuple[int, str, str, list[str]]:
    return ms(event), event["name"], event["user_id"], [item["item_id"] for item in event["items"]]


def test_retailrocket_rows_become_events_in_order_of_time(log: Log, tmp_path: Path) -> None:
    import_file("retailrocket", written(tmp_path, RETAILROCKET), log, CODEC)
    assert [summary(event) for event in by_time(log)] == [
        (1433221332117, "view_item", "257597", ["355908"]),
        (1433221999827, "purchase", "111016", ["318965"]),
        (1433224214164, "add_to_cart", "992329", ["248676"]),
    ]
    assert [event["params"] for event in by_time(log)] == [{}, {"transaction_id": "4000"}, {}]


def test_taobao_seconds_become_ms_and_its_categories_the_catalog(log: Log, tmp_path: Path) -> None:
    imported = import_file("taobao", written(tmp_path, TAOBAO), log, CODEC)
    assert [summary(event) for event in by_time(log)] == [
        (1511544070000, "view_item", "1", ["2268318"]),
        (1511544170000, "purchase", "1", ["2268318"]),
        (1511561733000, "add_to_wishlist", "1", ["2333346"]),
        (1511572885000, "add_to_cart", "100", ["2576651"]),
    ]
    catalog = {item["item_id"]: item["category"] for item in records(log, "catalog")}
    assert catalog == {"2268318": "2520377", "2333346": "2520771", "2576651": "149192"}
    assert (imported.events, imported.items) == (4, 3)


def test_rees46_prices_ride_on_events_and_changes_reach_the_catalog(log: Log, tmp_path: Path) -> None:
    import_file("rees46", written(tmp_path, REES46), log, CODEC)
    first, *_, last = by_time(log)
    assert summary(first) == (1569888000000, "view_item", "541312140", ["44600062"])
    assert (first["items"][0]["price"], first["session_id"]) == (35.79, "72d76fde")
    assert last["name"] == "purchase"
    told = [item for item in records(log, "catalog") if item["item_id"] == "44600062"]
    # the purchase tells a category and a new price, and no brand: the brand known before stays
    assert [(item["category"], item["brand"], item["price"]) for item in told] == [
        ("2103807459595387724", "shiseido", 35.79),
        ("cosmetics", "shiseido", 36.0),
    ]


def test_otto_sessions_become_users(log: Log, tmp_path: Path) -> None:
    import_file("otto", written(tmp_path, OTTO), log, CODEC)
    assert [summary(event) for event in by_time(log)] == [
        (1659304800024, "purchase", "43", ["7"]),
        (1659304800025, "view_item", "42", ["15"]),
        (1659304904511, "add_to_cart", "42", ["7"]),
        (1659304904512, "view_item", "42", ["7"]),
    ]


@pytest.mark.parametrize("layout", SAMPLES)
def test_plain_gzip_and_parquet_give_the_same_events(layout: str, tmp_path: Path) -> None:
    text = SAMPLES[layout]
    packed = tmp_path / "file.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    plain = imported_events(layout, written(tmp_path, text), tmp_path / "plain")
    assert imported_events(layout, packed, tmp_path / "gz") == plain
    assert imported_events(layout, as_parquet(tmp_path, layout, text), tmp_path / "parquet") == plain


def test_windows_line_ends_a_byte_order_mark_and_quotes_change_nothing(tmp_path: Path) -> None:
    quoted = "\n".join(",".join(f'"{c}"' for c in line.split(",")) for line in RETAILROCKET.splitlines())
    odd = written(tmp_path, "\ufeff" + quoted.replace("\n", "\r\n"), "odd")
    plain = imported_events("retailrocket", written(tmp_path, RETAILROCKET), tmp_path / "plain")
    assert imported_events("retailrocket", odd, tmp_path / "odd-log") == plain


def test_a_second_import_of_the_same_rows_in_another_order_has_the_same_ids(tmp_path: Path) -> None:
    header, *rows = REES46.splitlines(keepends=True)
    turned = written(tmp_path, header + "".join(reversed(rows)), "turned")
    plain = imported_events("rees46", written(tmp_path, REES46), tmp_path / "plain")
    assert imported_events("rees46", turned, tmp_path / "turned-log") == plain


def test_an_event_that_is_more_than_the_log_takes_is_refused_and_the_others_are_imported(
    log: Log, tmp_path: Path
) -> None:
    params = [{"key": "k", "value": {"string_value": "v" * 10**6}}]
    large = json.dumps(GA4_EXPORT | {"event_name": "page_view", "event_id": "e2", "event_params": params})
    lines = [json.dumps(GA4_EXPORT), large, json.dumps(GA4_EXPORT | {"event_name": "scroll"})]
    imported = import_file("ga4", written(tmp_path, "\n".join(lines)), log, CODEC)
    assert [event["name"] for event in by_time(log)] == [GA4_EXPORT["event_name"], "scroll"]
    assert (imported.events, imported.refused) == (2, {Refusal.TOO_LARGE: 1})
    assert imported.examples[Refusal.TOO_LARGE].startswith("event e2: record of 1,000,")


def test_two_identical_rows_are_two_events_with_ids_of_their_own(log: Log, tmp_path: Path) -> None:
    row = "1,2268318,2520377,pv,1511544070\n"
    import_file("taobao", written(tmp_path, row + row + row.replace("70", "71")), log, CODEC)
    ids = [event["event_id"] for event in by_time(log)]
    assert len(set(ids)) == 3
    again = [event["event_id"] for event in imported_events("taobao", tmp_path / "file", tmp_path / "again")]
    assert again == ids


def test_rows_of_one_time_keep_their_order_through_sorted_runs(tmp_path: Path) -> None:
    """Of the first run there are two blocks of such rows; those of the second come after both."""
    rows = 40_000
    path = tmp_path / "UserBehavior.csv"
    path.write_text("".join(f"7,{item},1,pv,1511544070\n" for item in range(rows)))
    tables = read_events("taobao", path, Imported())
    count, in_order = _sorted_by_time(tables, tmp_path, 20_000)
    found = [items[0]["item_id"] for block in in_order for items in block.column("items").to_pylist()]
    assert (count, found) == (rows, [str(item) for item in range(rows)])


def test_a_file_larger_than_memory_comes_out_in_order_of_time(tmp_path: Path) -> None:
    clock = random.Random(5)
    rows = [(clock.randrange(1_511_544_000, 1_511_545_000), n) for n in range(90_000)]
    text = "".join(f"{n},{n},1,pv,{second}\n" for second, n in rows)

    class Tape:
        """A log and its producer that keep what they are given, in order."""

        def __init__(self) -> None:
            self.users: list[int] = []

        def partitions(self, topic: str) -> int:
            return 1

        def bounds(self, topic: str) -> dict[int, Bounds]:
            return {}

        def producer(self) -> Tape:
            return self

        def send(self, topic: str, key: bytes, value: bytes) -> None:
            if topic == "events":
                self.users.append(int(key))

        def close(self) -> None: ...

    tape = Tape()
    path = written(tmp_path, text)
    import_file("taobao", path, tape, CODEC, ImportSettings(run_rows=20_000))  # type: ignore[arg-type]
    time_of = {n: second for second, n in rows}
    assert sorted(tape.users) == list(range(90_000))
    seconds = [time_of[user] for user in tape.users]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,2,3,pv", Refusal.COLUMNS),
        ("1,2,3,pv,1511544070,6", Refusal.COLUMNS),
        ("1,2,3,stare,1511544070", Refusal.NAME),
        (",2,3,pv,1511544070", Refusal.USER),
        ("u" * 1025 + ",2,3,pv,1511544070", Refusal.USER),
        ("1,,3,pv,1511544070", Refusal.ITEM),
        ("1,a\0b,3,pv,1511544070", Refusal.ITEM),
        ("1,2,3,pv,", Refusal.TIMESTAMP),
        ("1,2,3,pv,yesterday", Refusal.TIMESTAMP),
        ("1,2,3,pv,-1511544070", Refusal.TIMESTAMP),
        ("1,2,3,pv,99999999999999999999", Refusal.TIMESTAMP),
        ("1,2,3,pv,315532800", Refusal.TIMESTAMP),  # 1980
        ('1,"2,3,pv,1511544070', Refusal.COLUMNS),  # an open quote spoils its own line only
        ('1,"2"\r,3,pv,1511544070', Refusal.COLUMNS),
        ('1,"' + "2" * 131_073 + '",3,pv,1511544070', Refusal.COLUMNS),
    ],
)
def test_a_bad_row_is_refused_with_its_reason_and_the_others_stay(
    row: str, reason: Refusal, log: Log, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes((TAOBAO + row + "\n" + TAOBAO).encode())  # as it stands: a lone CR, too
    imported = import_file("taobao", path, log, CODEC)
    assert imported.refused == {reason: 1}
    assert imported.examples[reason] == f"line 5: {row}"[: len("line 5: ") + 200]
    assert imported.events == 8


@pytest.mark.parametrize("price", ["cheap", "1e10", "nan", "inf"])
def test_a_price_that_is_no_price_is_refused(price: str, log: Log, tmp_path: Path) -> None:
    imported = import_file("rees46", written(tmp_path, REES46.replace("33.20", price)), log, CODEC)
    assert (imported.refused, imported.events) == ({Refusal.NUMBER: 2}, 2)


def test_bytes_that_are_no_text_spoil_their_line_only(log: Log, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(TAOBAO.encode() + b"1,\xff\xfe,3,pv,1511544070\n")
    imported = import_file("taobao", path, log, CODEC)
    assert (imported.refused, imported.events) == ({Refusal.UTF8: 1}, 4)


def test_refusals_are_told_by_reason_with_the_first_of_each(log: Log, tmp_path: Path) -> None:
    bad = "1,2,3,stare,1511544070\n1,2,3,sniff,1511544070\n"
    told = str(import_file("taobao", written(tmp_path, TAOBAO + bad), log, CODEC))
    assert told.splitlines() == [
        "4 events and 3 catalog records written, 2017-11-24 17:21 to 2017-11-25 01:21",
        "  refused 2: unknown event name (first: line 5: 1,2,3,stare,1511544070)",
    ]


def test_a_file_of_another_layout_says_which_columns_are_missing(log: Log, tmp_path: Path) -> None:
    with pytest.raises(
        ImportFailed, match="no column event_time, which rees46 files have; found event, itemid"
    ):
        import_file("rees46", written(tmp_path, RETAILROCKET), log, CODEC)
    with pytest.raises(ImportFailed, match="nothing in it could be read as taobao"):
        import_file("taobao", written(tmp_path, OTTO), log, CODEC)


def test_broken_files_are_named(log: Log, tmp_path: Path) -> None:
    torn = tmp_path / "torn.gz"
    torn.write_bytes(gzip.compress(TAOBAO.encode() * 100)[:-20])
    zipped = tmp_path / "archive.zip"
    zipped.write_bytes(b"PK\x03\x04 and so on")
    stub = tmp_path / "stub.parquet"
    stub.write_bytes(b"PAR1 and nothing else")
    for path, why in ((torn, "broken"), (zipped, "unpack it first"), (stub, "broken")):
        with pytest.raises(ImportFailed, match=f"{path.name}.*{why}"):
            import_file("taobao", path, log, CODEC)


GA4_EXPORT = {
    "event_name": "purchase",
    "event_timestamp": "1611100800123456",
    "user_pseudo_id": "77.88",
    "user_id": None,
    "event_params": [
        {"key": "ga_session_id", "value": {"int_value": 5, "string_value": None}},
        {"key": "page_title", "value": {"string_value": "Checkout"}},
        {"key": "currency", "value": {"string_value": "EUR"}},
    ],
    "ecommerce": {"purchase_revenue": 30.0, "transaction_id": "T1"},
    "items": [
        {"item_id": "sku1", "quantity": "2", "price": 10.0, "item_brand": "Acme", "item_category": "Mugs"},
        {"item_id": "(not set)"},
        {"item_id": "sku2", "price": None, "quantity": None},
    ],
}


@pytest.mark.parametrize("nothing", [{}, {"item_brand": None}, {"item_brand": "(not set)"}])
def test_what_ga4_was_not_told_of_an_item_is_no_brand(tmp_path: Path, nothing: dict[str, Any]) -> None:
    """Nor hides it what the item says by our own name."""
    items = [{"item_id": "a", **nothing}, {"item_id": "b", **nothing, "brand": "Acme"}]
    path = written(tmp_path, json.dumps(GA4_EXPORT | {"items": items}))
    (table,) = read_events("ga4", path, Imported())
    assert [item["brand"] for item in table.column("items").to_pylist()[0]] == [None, "Acme"]


def test_a_ga4_export_becomes_our_event(log: Log, tmp_path: Path) -> None:
    import_file("ga4", written(tmp_path, json.dumps(GA4_EXPORT) + "\n"), log, CODEC)
    (event,) = by_time(log)
    assert summary(event) == (1611100800123, "purchase", "77.88", ["sku1", "sku2"])
    assert (event["session_id"], event["value"], event["currency"]) == ("5", 30.0, "EUR")
    assert [(item["quantity"], item["price"]) for item in event["items"]] == [(2, 10.0), (1, None)]
    assert event["params"] == {"page_title": "Checkout", "transaction_id": "T1"}
    (item,) = records(log, "catalog")
    assert (item["item_id"], item["category"], item["brand"], item["price"]) == ("sku1", "Mugs", "Acme", 10.0)


def test_ga4_from_parquet_equals_ga4_from_lines(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GA4_EXPORT]), tmp_path / "ga4.parquet")
    lines = written(tmp_path, json.dumps(GA4_EXPORT))
    plain = imported_events("ga4", lines, tmp_path / "plain")
    assert imported_events("ga4", tmp_path / "ga4.parquet", tmp_path / "parquet") == plain


def test_our_own_event_as_json_keeps_its_id(log: Log, tmp_path: Path) -> None:
    own = {
        "event_id": "e1",
        "name": "select_item",
        "user_id": "anna",
        "timestamp": "2026-01-02T03:04:05+01:00",
        "items": [{"item_id": "a", "index": 3}],
        "recommendation_id": "r1",
        "params": {"page": "home", "depth": 2, "bot": False},
    }
    search = {"name": "search", "user_id": "anna", "timestamp": 1767319446000}
    import_file("ga4", written(tmp_path, f"{json.dumps(own)}\n{json.dumps(search)}\n"), log, CODEC)
    first, second = by_time(log)
    assert summary(first) == (1767319445000, "select_item", "anna", ["a"])
    assert (first["event_id"], first["recommendation_id"]) == ("e1", "r1")
    assert first["params"] == {"page": "home", "depth": "2", "bot": "false"}
    assert first["items"][0]["index"] == 3
    assert summary(second) == (1767319446000, "search", "anna", [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"event_name": None}, Refusal.NAME),
        ({"event_name": "n" * 65}, Refusal.NAME),
        ({"user_pseudo_id": ""}, Refusal.USER),
        ({"user_pseudo_id": "\ud800"}, Refusal.USER),
        ({"items": [{"item_id": ""}]}, Refusal.ITEM),
        ({"items": [{"item_id": "a", "price": "dear"}]}, Refusal.NUMBER),
        ({"items": [{"item_id": "a", "quantity": -1}]}, Refusal.NUMBER),
        ({"items": [{"item_id": "a", "price": float("nan")}]}, Refusal.NUMBER),
        ({"items": [{"item_id": "a"}] * 1001}, Refusal.TOO_MANY),
        ({"items": "a, b"}, Refusal.JSON),
        ({"event_timestamp": None}, Refusal.TIMESTAMP),
        ({"event_timestamp": "soon"}, Refusal.TIMESTAMP),
        ({"event_timestamp": 10**30}, Refusal.TIMESTAMP),
        ({"ecommerce": {"purchase_revenue": 10**330}}, Refusal.NUMBER),
        ({"items": [{"item_id": "a", "quantity": 10**330}]}, Refusal.NUMBER),
        ({"event_params": [1]}, Refusal.JSON),
        ({"event_params": [None]}, Refusal.JSON),
    ],
)
def test_a_bad_ga4_event_is_refused(change: dict[str, Any], reason: Refusal, tmp_path: Path) -> None:
    imported = Imported()
    path = written(tmp_path, json.dumps(GA4_EXPORT | change) + "\n" + json.dumps(GA4_EXPORT))
    tables = list(read_events("ga4", path, imported))
    assert (imported.refused, sum(table.num_rows for table in tables)) == ({reason: 1}, 1)


@pytest.mark.parametrize("line", ["", "{", "[1]", "7", "[" * 100_000])
@pytest.mark.parametrize("layout", ["ga4", "otto"])
def test_a_line_that_is_no_object_is_refused(layout: str, line: str, tmp_path: Path) -> None:
    imported = Imported()
    assert sum(t.num_rows for t in read_events(layout, written(tmp_path, line + "\n"), imported)) == 0
    assert imported.refused == ({Refusal.JSON: 1} if line else {})


@pytest.mark.parametrize("events", [None, {}, ["a"], "x"])
def test_an_otto_session_without_a_list_of_events_is_refused(events: Any, tmp_path: Path) -> None:
    imported = Imported()
    path = written(tmp_path, json.dumps({"session": 1, "events": events}))
    assert sum(t.num_rows for t in read_events("otto", path, imported)) == 0
    assert imported.refused == {Refusal.JSON: 1}


def test_pandas_floats_for_ids_are_whole_again(log: Log, tmp_path: Path) -> None:
    table = pa.table(
        {
            "timestamp": [1433221332117, 1433221332118],
            "visitorid": [7.0, None],
            "event": pa.array(["view", "view"]).dictionary_encode(),
            "itemid": [8.0, 9.0],
            "transactionid": [float("nan"), 1.0],
        }
    )
    pq.write_table(table, tmp_path / "file.parquet")
    imported = import_file("retailrocket", tmp_path / "file.parquet", log, CODEC)
    assert [summary(event) for event in by_time(log)] == [(1433221332117, "view_item", "7", ["8"])]
    assert imported.refused == {Refusal.USER: 1}


WHOLE = {"timestamp": [1433221332117] * 2, "visitorid": [7, 8], "event": ["view"] * 2, "itemid": [1, 1]}
NO_TEXT = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"], pa.binary()).buffers())


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("visitorid", [1.0, float("inf")], Refusal.USER),
        ("itemid", [1.0, 1e19], Refusal.ITEM),
        ("timestamp", [1433221332117.0, float("-inf")], Refusal.TIMESTAMP),
        ("timestamp", pa.array([1433221332117, 2**62], pa.timestamp("ms")), Refusal.TIMESTAMP),
        ("visitorid", [b"a", b"\xff"], Refusal.USER),
        ("visitorid", NO_TEXT, Refusal.USER),
    ],
)
def test_an_odd_value_in_parquet_spoils_its_own_row_only(
    column: str, values: Any, reason: Refusal, log: Log, tmp_path: Path
) -> None:
    pq.write_table(pa.table(WHOLE | {column: values}), tmp_path / "file.parquet")
    imported = import_file("retailrocket", tmp_path / "file.parquet", log, CODEC)
    assert (imported.refused, imported.events) == ({reason: 1}, 1)
    assert imported.examples[reason].startswith("row 2: {'timestamp': ")


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("event_timestamp", pa.array([1611100800123, 2**62], pa.timestamp("ms")), Refusal.TIMESTAMP),
        ("page", NO_TEXT, Refusal.UTF8),
    ],
)
def test_an_odd_value_in_ga4_as_parquet_spoils_its_own_row_only(
    column: str, values: Any, reason: Refusal, log: Log, tmp_path: Path
) -> None:
    columns = {"event_name": ["view_item"] * 2, "event_timestamp": [1611100800123] * 2, "user_id": ["a"] * 2}
    pq.write_table(pa.table(columns | {column: values}), tmp_path / "file.parquet")
    imported = import_file("ga4", tmp_path / "file.parquet", log, CODEC)
    assert (imported.refused, imported.events) == ({reason: 1}, 1)


OTTO_EVENT = {"aid": 1, "ts": 1659304800025, "type": "clicks"}


@pytest.mark.parametrize(
    ("layout", "table", "told"),
    [
        (
            "otto",
            {"events": [[OTTO_EVENT]], "id": [1]},
            "no column session, which otto files have; found events",
        ),
        (
            "otto",
            {"session": [1], "events": [[{"aid": 1}]]},
            "no lists of aid, ts, type in its column events",
        ),
        ("otto", {"session": [1], "events": ["x"]}, "no lists of aid, ts, type in its column events"),
        ("retailrocket", {**WHOLE, "ItemId": [1, 1]}, "2 columns itemid"),
    ],
)
def test_a_column_that_is_missing_or_there_twice_is_named(
    layout: str, table: dict[str, Any], told: str, log: Log, tmp_path: Path
) -> None:
    pq.write_table(pa.table(table), tmp_path / "file.parquet")
    with pytest.raises(ImportFailed, match=told):
        import_file(layout, tmp_path / "file.parquet", log, CODEC)


def test_columns_that_nobody_reads_may_be_there_twice(log: Log, tmp_path: Path) -> None:
    names = [*WHOLE, "note", "note"]
    pq.write_table(pa.table([*WHOLE.values(), [1, 2], [3, 4]], names=names), tmp_path / "file.parquet")
    assert import_file("retailrocket", tmp_path / "file.parquet", log, CODEC).events == 2


def test_a_header_with_a_column_twice_is_refused(log: Log, tmp_path: Path) -> None:
    path = written(tmp_path, RETAILROCKET.replace("transactionid", "itemid", 1))
    with pytest.raises(ImportFailed, match="2 columns itemid"):
        import_file("retailrocket", path, log, CODEC)


def readable(log: Log) -> int:
    """How many records of the topic the learner can read; asserts that it is all of them."""
    bounds = log.bounds("events")
    reader, count = log.reader("events", {p: ends.low for p, ends in bounds.items()}), 0
    while len(batch := reader.poll(1000, 0.2)):
        kind = Decoder(CODEC, Vocabulary()).decode(batch).kind
        assert (kind == Kind.EVENT).all()
        count += len(batch)
    reader.close()
    return count


def test_texts_with_a_null_character_are_left_out_and_what_is_written_can_be_read(
    log: Log, tmp_path: Path
) -> None:
    spoilt = REES46.replace("72d76fde", "72\0").replace("shiseido", "shi\0do").replace("cosmetics", "\0")
    import_file("rees46", written(tmp_path, spoilt), log, CODEC)
    assert [event["session_id"] for event in by_time(log)] == [None, "9333dfbd", "9333dfbd", None]
    assert {item["brand"] for item in records(log, "catalog")} == {None}
    assert {item["category"] for item in records(log, "catalog")} == {
        "2103807459595387724",
        "appliances.water_heater",
    }
    import_file("retailrocket", written(tmp_path, RETAILROCKET.replace("4000", "40\0")), log, CODEC)
    assert all(event["params"] == {} for event in by_time(log))
    assert readable(log) == 7


def test_names_and_ids_that_no_event_may_have_are_left_out_of_ga4(log: Log, tmp_path: Path) -> None:
    odd = ("a\0b", "\ud800", "")
    params = [{"key": key, "value": {"string_value": "x"}} for key in (*odd, "page")]
    export = GA4_EXPORT | {"event_params": params, "ecommerce": dict.fromkeys(odd, "x")}
    own = {"event_id": "e" * 1025, "name": "search", "user_id": "anna", "timestamp": 1767319446000}
    own["params"] = {"a\0b": "x", "page": "home"}
    import_file("ga4", written(tmp_path, f"{json.dumps(export)}\n{json.dumps(own)}\n"), log, CODEC)
    assert [event["params"] for event in by_time(log)] == [{"page": "x"}, {"page": "home"}]
    assert readable(log) == 2


def test_fractions_of_a_second_keep_the_order_and_the_ids_that_parquet_gives(tmp_path: Path) -> None:
    text = REES46.replace("00:00:00 UTC", "00:00:01.9 UTC").replace("00:00:01 UTC", "00:00:01.10059Z")
    path = written(tmp_path, text)
    plain = imported_events("rees46", path, tmp_path / "plain")
    assert [event["timestamp"] - 1569888000000 for event in plain] == [1100, 1900, 2000, 5000]
    times = pa.array([1_900_000, 1_100_590, 2_000_000, 5_000_000], pa.int64())
    columns = pa.csv.read_csv(path).drop_columns("event_time")
    stamped = columns.append_column("event_time", pc.add(times, 1569888000_000_000).cast(pa.timestamp("us")))
    pq.write_table(stamped, tmp_path / "file.parquet")
    assert imported_events("rees46", tmp_path / "file.parquet", tmp_path / "parquet") == plain


@pytest.mark.parametrize("time", ["2019-02-30 00:00:00", "2019-02-29T00:00:00Z", "2019-04-31 12:00:00.5 UTC"])
def test_a_day_that_no_month_has_is_no_time(time: str, log: Log, tmp_path: Path) -> None:
    imported = import_file(
        "rees46", written(tmp_path, REES46.replace("2019-10-01 00:00:00 UTC", time)), log, CODEC
    )
    assert (imported.refused, imported.events) == ({Refusal.TIMESTAMP: 1}, 3)


def test_topics_that_are_there_keep_their_partitions_and_missing_ones_are_created(
    log: Log, tmp_path: Path
) -> None:
    log.create_topic("events", 3)  # growing it would move users to other partitions
    import_file("taobao", written(tmp_path, TAOBAO), log, CODEC, ImportSettings(partitions=5))
    topics = ("events", "catalog", "events.dlq", "events.late")
    assert [log.partitions(topic) for topic in topics] == [3, 1, 1, 1]


def test_topics_may_have_other_names(log: Log, tmp_path: Path) -> None:
    settings = ImportSettings(topic="deeds", catalog="goods", partitions=2)
    import_file("taobao", written(tmp_path, TAOBAO), log, CODEC, settings)
    assert sum(bounds.high for bounds in log.bounds("deeds").values()) == 4
    assert log.bounds("goods")[0].high == 3
    assert log.partitions("events") == 0


def test_a_full_producer_queue_delays_and_loses_nothing(log: Log, tmp_path: Path) -> None:
    class Narrow:
        """A log whose producer takes one record between flushes."""

        def __init__(self) -> None:
            self.inner, self.room = log.producer(), 1

        def partitions(self, topic: str) -> int:
            return log.partitions(topic)

        def bounds(self, topic: str) -> dict[int, Bounds]:
            return log.bounds(topic)

        def create_topic(self, topic: str, partitions: int, **rest: Any) -> bool:
            return log.create_topic(topic, partitions, **rest)

        def producer(self) -> Narrow:
            return self

        def send(self, topic: str, key: bytes, value: bytes) -> None:
            if self.room == 0:
                raise LogFull("one at a time")
            self.room = 0
            self.inner.send(topic, key, value)

        def flush(self, timeout_s: float) -> int:
            self.room = 1
            return self.inner.flush(timeout_s)

        def close(self) -> None:
            self.inner.close()

    import_file("taobao", written(tmp_path, TAOBAO), Narrow(), CODEC)  # type: ignore[arg-type]
    assert len(records(log)) == 4


def test_progress_reaches_its_end_in_both_phases(log: Log, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    path = written(tmp_path, TAOBAO)
    import_file("taobao", path, log, CODEC, progress=lambda phase, *share: seen.update({phase: share}))
    assert seen == {"reading": (len(TAOBAO), len(TAOBAO)), "writing": (4, 4)}


def test_a_bar_on_a_terminal_redraws_one_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seconds = iter(range(10))
    out = Terminal()
    bar = Bar(out, lambda: float(next(seconds)))
    for done in range(3):
        bar("reading", done, 2)
    lines = out.getvalue().split("\r")
    assert [line.split("]")[-1].strip() for line in lines[1:]] == ["50% 1 s", "100% 2 s"]
    assert out.getvalue().count("\n") == 1


def test_settings_name_their_range() -> None:
    with pytest.raises(ValueError, match=r"run_rows must be within 1000\.\.100000000, not 3"):
        ImportSettings(run_rows=3)


# --- the catalog of a shop that feeds it by itself


def shop_says(log: Log, item_id: str, **fields: Any) -> None:
    """The shop writes a record of its catalog; without fields it takes the item out of it."""
    value = CODEC.encode_item({"item_id": item_id, **fields}) if fields else None
    shop_writes(log, item_id, value)


def shop_writes(log: Log, item_id: str, value: bytes | None) -> None:
    producer = log.producer()
    producer.send("catalog", item_id.encode(), value)
    producer.close()


def ends(log: Log, topic: str) -> dict[int, int]:
    return {partition: bounds.high for partition, bounds in log.bounds(topic).items()}


def test_a_second_import_leaves_the_catalog_as_the_shop_has_it(log: Log, tmp_path: Path) -> None:
    path = written(tmp_path, REES46)
    assert import_file("rees46", path, log, CODEC).items == 3
    shop_says(
        log, "44600062", category="cosmetics", brand="shiseido", price=40.0, in_stock=False, vector=[0.5]
    )
    shop_says(log, "3900821")
    before = ends(log, "catalog")
    assert import_file("rees46", path, log, CODEC).items == 0
    assert ends(log, "catalog") == before


def test_an_import_adds_to_a_record_of_the_shops_what_it_does_not_say(log: Log, tmp_path: Path) -> None:
    log.create_topic("catalog", 1, compacted=True)
    shop = {"category": "creams", "in_stock": False, "vector": [0.5, 2.0], "title": "Cream"}
    shop_says(log, "44600062", **shop)
    import_file("rees46", written(tmp_path, REES46), log, CODEC)
    told = [item for item in records(log, "catalog") if item["item_id"] == "44600062"]
    base = {"item_id": "44600062", "price": None, "brand": None, **shop}
    # the brand and the price are news, a new price of the file's own is, too; the category is the shop's
    first, last = {"brand": "shiseido", "price": 35.79}, {"brand": "shiseido", "price": 36.0}
    assert told == [base, base | first, base | last]


def test_a_record_that_cannot_be_read_here_is_left_alone(log: Log, tmp_path: Path) -> None:
    log.create_topic("catalog", 1, compacted=True)
    unknown = b"\xc3\x01" + bytes(8) + b"of a version of Item that is not known here"
    shop_writes(log, "44600062", unknown)
    shop_writes(log, "3900821", CODEC.encode_item({"item_id": "another"}))
    before = ends(log, "catalog")
    assert import_file("rees46", written(tmp_path, REES46), log, CODEC).items == 0
    assert ends(log, "catalog") == before


def test_the_whole_catalog_is_read_before_anything_is_added_to_it(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.import_catalog._BATCH", 2)
    log.create_topic("catalog", 3, compacted=True)
    for item_id in [f"other{n}" for n in range(8)] + ["44600062", "3900821"]:
        shop_says(log, item_id, category="c", brand="b", price=1.0)
    assert import_file("rees46", written(tmp_path, REES46), log, CODEC).items == 0
