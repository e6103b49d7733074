"""A simulated shop's day as records in a log: what a storefront and a policy server would have written."""

from __future__ import annotations

import numpy as np

from simulator.shop import Shop, ShopSettings
from simulator.traffic import Publisher, user_id
from streaming.log import Log
from streaming.rewards import EVENT_NAMES
from streaming.schemas import Codec


def write_shop(
    log: Log,
    decisions: int,
    *,
    seed: int = 0,
    slots: int = 4,
    partitions: int = 4,
    items: int = 100,
    shoppers: int = 200,
) -> int:
    """Write at least so many decisions, slates drawn at random, and all that came of them; returns how many."""
    log.create_topic("events", partitions)
    log.create_topic("catalog", 1, compacted=True)
    shop = Shop(ShopSettings(items=items, categories=10, shoppers=shoppers), seed)
    codec, rng = Codec(), np.random.default_rng(seed)
    producer = log.producer()
    pen = Publisher(shop, producer, codec)
    names: dict[int, str] = {}
    served = 0
    while served < decisions:
        turn = shop.next_turn()
        pen.catalog(int(turn.timestamp_ms.max()), turn.available)
        pen.events(turn.events, f"run-{seed}", names)
        on_offer = np.flatnonzero(turn.available)
        slates = np.stack([rng.choice(on_offer, slots, replace=False) for _ in turn.shopper])
        for b in range(len(turn.shopper)):
            names[int(turn.decision[b])] = f"r{seed}-{turn.decision[b]}"
            record = _decision(shop, turn, b, slates[b], len(on_offer), names[int(turn.decision[b])])
            producer.send("events", record["user_id"].encode(), codec.encode_decision(record))
        pen.events(shop.show(turn, slates).events, f"run-{seed}", names)
        served += len(turn.shopper)
    producer.close()
    return served


def _decision(shop, turn, b, slate, on_offer, name):
    past = turn.history
    known = int((past.item[b] >= 0).sum())
    return {
        "recommendation_id": name,
        "user_id": user_id(int(turn.shopper[b])),
        "timestamp": int(turn.timestamp_ms[b]),
        "history": [
            {
                "item_id": shop.item_ids[past.item[b, h]],
                "name": EVENT_NAMES[past.name[b, h]],
                "timestamp": int(past.timestamp_ms[b, h]),
                "value": float(past.value[b, h]),
            }
            for h in reversed(range(known))
        ],
        "slate": [
            {"item_id": shop.item_ids[i], "propensity": 1 / (on_offer - k)}
            for k, i in enumerate(slate.tolist())
        ],
        "epsilon": 1.0,
        "policy_version": 0,
        "strategy": "RANDOM",
    }
