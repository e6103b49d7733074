"""What the shop sells: a seeded catalog, what of it shoppers can see, and what stays hidden in their heads."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.draws import uniform

DAY_MS: Final = 86_400_000
VECTOR_DIM: Final = 16
STYLE_DIM: Final = 6
# A main category and, beside it, the category of its accessories.
PAIRS: Final = (
    ("phones", "phone-cases"),
    ("laptops", "laptop-bags"),
    ("cameras", "lenses"),
    ("bicycles", "bike-lights"),
    ("tents", "sleeping-bags"),
    ("espresso-machines", "coffee"),
    ("guitars", "guitar-strings"),
    ("running-shoes", "running-socks"),
    ("printers", "ink"),
    ("drones", "batteries"),
)


class Goods(NamedTuple):
    """N items. Main categories are 0..C/2-1; the accessories of main category c are category c + C/2."""

    # what the catalog topic says
    item_id: tuple[str, ...]  # [N]
    category: npt.NDArray[np.int32]  # [N]
    brand: npt.NDArray[np.int32]  # [N]
    price: npt.NDArray[np.float64]  # [N] EUR
    vector: npt.NDArray[
        np.float32
    ]  # [N, 16] style and depth, rotated, with noise: an embedding of the item's text
    category_name: tuple[str, ...]  # [C]
    brand_name: tuple[str, ...]  # [brands]
    # what only the shoppers' choices reveal
    popularity: npt.NDArray[np.float64]  # [N] log of its Zipf weight, mean 0
    depth: npt.NDArray[
        np.float64
    ]  # [N] in -1..1: a bait disappoints (< 0), a solid page helps to decide (> 0)
    style: npt.NDArray[np.float64]  # [N, 6] unit length
    level: npt.NDArray[np.float64]  # [N] price level within its category: log(price / the category's middle)
    release_ms: npt.NDArray[np.int64]  # [N] event time from which it is in the catalog
    members: npt.NDArray[np.int32]  # [C, most items in one category], padded with -1


def make_goods(
    items: int, categories: int, brands: int, new_items: float, start_ms: int, rng: np.random.Generator
) -> Goods:
    """A catalog. A brand has a style and sells either mostly baits or mostly solid goods; baits are cheap.

    new_items: the share of the items that is released during the first ten days rather than at the start.
    """
    category = np.sort(rng.integers(categories, size=items)).astype(np.int32)
    category[:categories] = np.arange(categories)  # none is empty
    category.sort()
    brand = rng.integers(brands, size=items).astype(np.int32)
    bait_share = np.where(rng.random(brands) < 0.35, 0.9, 0.1)  # [brands]
    bait = rng.random(items) < bait_share[brand]
    depth = np.clip(np.where(bait, -0.7, 0.6) + 0.15 * rng.standard_normal(items), -1.0, 1.0)
    style = _unit(
        _unit(rng.standard_normal((brands, STYLE_DIM)))[brand]
        + 0.35 * rng.standard_normal((items, STYLE_DIM))
    )
    level = 0.45 * rng.standard_normal(items) - 0.3 * bait
    middle = np.exp(rng.normal(np.where(np.arange(categories) < categories // 2, 5.5, 3.0), 0.5))  # [C] EUR
    price = np.round(middle[category] * np.exp(level), 2)
    weight = -np.log1p(rng.permutation(items))  # log of Zipf's 1/rank
    hidden = np.concatenate([style, depth[:, None]], axis=1) @ _unit(
        rng.standard_normal((STYLE_DIM + 1, VECTOR_DIM))
    )
    vector = (hidden + 0.1 * rng.standard_normal((items, VECTOR_DIM))).astype(np.float32)
    fresh = rng.random(items) < new_items
    release = start_ms + np.where(fresh, rng.integers(DAY_MS // 2, 10 * DAY_MS, size=items), 0)
    names = _category_names(categories)
    return Goods(
        item_id=tuple(f"{names[c]}-{i:04d}" for i, c in enumerate(category)),
        category=category,
        brand=brand,
        price=price,
        vector=vector,
        category_name=names,
        brand_name=tuple(f"brand-{b:02d}" for b in range(brands)),
        popularity=weight - weight.mean(),
        depth=depth,
        style=style,
        level=level,
        release_ms=release.astype(np.int64),
        members=_members(category, categories),
    )


def available(goods: Goods, seed: int, time_ms: int, stock_out_share: float) -> npt.NDArray[np.bool_]:
    """[N], which items are released and in stock at this event time: a pure function of seed and time.

    Each item runs out for whole half-days, its own clock shifted, in `stock_out_share` of them.
    """
    item = np.arange(len(goods.price), dtype=np.uint64)
    shift = (uniform(seed, item, 101) * DAY_MS).astype(np.int64)
    half_day = (time_ms + shift) // (DAY_MS // 2)
    in_stock = uniform(seed, item, half_day.astype(np.uint64), 102) >= stock_out_share
    return in_stock & (goods.release_ms <= time_ms)


def season(categories: int, time_ms: int, start_ms: int, season_days: float) -> npt.NDArray[np.float64]:
    """[C] in -1..1: the season of each category; an accessory shares that of its main category.

    A wave of `season_days` from high to high, each main category with its own phase.
    """
    main = np.arange(categories) % (categories // 2)
    phase = main / (categories // 2)
    wave: npt.NDArray[np.float64] = np.cos(
        2 * np.pi * ((time_ms - start_ms) / (DAY_MS * season_days) + phase)
    )
    return wave


def _unit(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each row scaled to length 1."""
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def _category_names(categories: int) -> tuple[str, ...]:
    half = categories // 2
    pairs = [PAIRS[i] if i < len(PAIRS) else (f"main-{i:02d}", f"extra-{i:02d}") for i in range(half)]
    return tuple(main for main, _ in pairs) + tuple(extra for _, extra in pairs)


def _members(category: npt.NDArray[np.int32], categories: int) -> npt.NDArray[np.int32]:
    groups = [np.flatnonzero(category == c) for c in range(categories)]
    members = np.full((categories, max(map(len, groups))), -1, dtype=np.int32)
    for c, group in enumerate(groups):
        members[c, : len(group)] = group
    return members
