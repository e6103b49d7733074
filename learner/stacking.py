"""Choice as it was foretold, set right by what then came.

What a network has learnt from again and again it foretells better than what comes next; by far, where choices are few.
So each slot's log-odds z are noted before anything is learnt from it (progressive validation: Blum et al. 1999), and a
small model on top of them is fitted to what came of the slots (stacked generalisation: Wolpert 1992):

    logit p(s, a) = c + κ z(s, a) + ω √share(s, a) + level_a + θ · (x_a - x̄) + Σ_j answer_{j a} √share(s, j)

share is that of the history's entries that are of an item; level_a ~ N(0, σ²); what its vector x_a says is learnt by
learner.feature_levels; the sum is learner.answers', over those that have a near them. What is foretold too boldly is
shrunk (κ < 1), and what a network takes long to learn, or finds no use for where it fits luck just as well, gets the
weight that it earns: what one goes back to, how well an item does with all, what describes it, and how it does with
those who look at what is like it. Before there is something to learn it from, p is as z has it.

The mode of the posterior is found by Newton's steps, over the newest slots, now and then; σ² goes where the evidence is
highest (Laplace's approximation: MacKay 1992), a step on a grid at a time. Between, levels and answers follow each slot
by a step of their own: whatever seems best because it was lucky is shown at once, and should be found out soon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.answer_fit import FEW, AnswerFit, Looks, Nearest, Pairs, sums
from learner.answers import READ, Pulls, Table, looks_of, no_pairs, pulls_of
from learner.feature_levels import MOST_IN_VECTOR, MOST_SAID, FeatureFit, Vectors

NEWEST: Final = 1 << 17  # slots that are kept to fit to
OFTEN: Final = (512, 32)  # fitted anew after so many slots, or a share (1 in) of all kept, whichever is more
# of c (at the mean of z), κ and ω. What z is worth on slates at random says too little of what it is worth among the
# best, where an encoder that is still learning gets its clicks: κ needs much to go far from one
PRIOR_MEAN: Final = np.array([0.0, 1.0, 0.0])
PRIOR_PRECISION: Final = np.array([1.0, 25.0, 0.25])
# the grid of σ², log-odds squared. Evidence may ask for more: how an item does among slates at random is not how it
# does where it is shown for its level, and the best of a hundred wide levels is a lucky one
WIDTHS: Final = tuple(10.0 ** (exponent / 2) for exponent in range(-8, -2))
FIRST_WIDTH: Final = 3  # its place there before anything is known
# what vectors say is fitted to the newest of these slots alone, so many or a share (1 in), whichever is more: what was
# foretold before was foretold knowing less of it, and it would be said twice
LATELY: Final = (4096, 8)
ROUNDS: Final = 2  # of a fit: all else given the answers, the answers given all else
_MOST_STEPS: Final = 12  # of Newton
_FURTHEST: Final = 2.0  # that any moves in one step, log-odds
_NEAR: Final = 1e-4  # log-odds by which the last of them moves at most

Floats = npt.NDArray[np.float64]


class Stack(nn.Module):
    """The layer's values; of which `StackFit` learns."""

    weights: Tensor
    level: Tensor
    source: Tensor
    near: Tensor
    answer: Tensor
    slope: Tensor

    def __init__(self, items: int, vector_dim: int = 0) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([0.0, 1.0, 0.0]))  # c, κ, ω
        self.register_buffer("level", torch.zeros(items))
        self.register_buffer("slope", torch.zeros(vector_dim + 1))  # see FeatureFit.served
        # of as many rows as there are items that anything is known to answer to
        for name, column in no_pairs()._asdict().items():
            self.register_buffer(name, torch.from_numpy(column))

    def levels(self, level: Tensor, vector: Tensor) -> Tensor:
        """How well items do with all, [M]: their own levels [M], and what their vectors [M, vector_dim] say."""
        if self.slope.device.type == "cpu" and not bool(self.slope.any()):  # elsewhere to ask takes longer
            return level
        said = vector.clamp(-MOST_IN_VECTOR, MOST_IN_VECTOR) @ self.slope[:-1] + self.slope[-1]
        return level + said.clamp(-MOST_SAID, MOST_SAID) * (vector != 0).any(dim=1)

    def answers(self, item: Tensor, ids: Tensor | None = None) -> Pulls | None:
        """What histories add by the items near theirs. See `pulls_of`."""
        return pulls_of(self.source, self.near, self.answer, item, ids) if len(self.source) > 1 else None


class _Fitted(NamedTuple):
    """The mode, for one σ²."""

    weights: Floats  # [3]
    level: Floats  # [M]
    information: Floats  # [M] Fisher's, of each level
    evidence: float


class StackFit:
    """Learns a `Stack`, and keeps what that takes: what was foretold of the newest slots, and what came."""

    def __init__(
        self,
        stack: Stack,
        nearest: Nearest | None = None,
        vectors: Callable[[npt.NDArray[np.integer]], Vectors] | None = None,
    ) -> None:
        """nearest: see `AnswerFit`; vectors: of items by vocabulary ids [T], [T, vector_dim]; None: they have none."""
        self.stack = stack
        self.features = FeatureFit(len(stack.slope) - 1)
        self._vectors = vectors or (lambda item: np.zeros((len(item), len(stack.slope) - 1), np.float32))
        self.answers = AnswerFit(nearest)
        self.slots = self.fitted = 0  # ever noted; and at the last fit
        self.width = FIRST_WIDTH
        self._wider = False  # than now, is what the last fit tried for σ²; else narrower
        self._item = np.zeros(NEWEST, np.int32)
        self._z, self._back = np.zeros((2, NEWEST), np.float32)
        self._chosen = np.zeros(NEWEST, np.bool_)
        self._look = np.zeros((NEWEST, READ), np.int32)  # what the histories hold; see `looks_of`
        self._root = np.zeros((NEWEST, READ), np.float16)
        self._information = np.zeros(len(stack.level), np.float32)

    def note(
        self,
        item: npt.NDArray[np.integer],
        log_odds: npt.NDArray[np.float32],
        back: npt.NDArray[np.float32],
        chosen: npt.NDArray[np.bool_],
        history: npt.NDArray[np.integer],
    ) -> None:
        """T slots, of which nothing has been learnt so far: vocabulary ids that there is room for, z, √share, whether
        they were chosen, and the histories' items, [T, H]. Where enough are new, all is fitted anew."""
        at = (self.slots + np.arange(len(item))[-NEWEST:]) % NEWEST
        look, root = looks_of(history)
        columns: tuple[npt.NDArray[Any], ...] = item, log_odds, back, chosen, look, root
        for name, new in zip(_RING, columns, strict=True):
            getattr(self, f"_{name}")[at] = new[-NEWEST:]
        self.slots += len(item)
        least, share = OFTEN
        if self.slots - self.fitted >= max(least, min(self.slots, NEWEST) // share):
            self.fit()
        else:
            self._follow(Looks(item, look, root), log_odds, back, chosen)

    def _follow(
        self,
        looks: Looks,
        log_odds: npt.NDArray[np.float32],
        back: npt.NDArray[np.float32],
        chosen: npt.NDArray[np.bool_],
    ) -> None:
        """A step of the levels and answers alone, from these slots alone."""
        ids, of = np.unique(looks.item, return_inverse=True)
        pairs = Pairs.of(self.answers.table, looks)
        rows = torch.from_numpy(ids.astype(np.int64)).to(self.stack.level.device)
        level = self.stack.level[rows].cpu().numpy().astype(np.float64)
        c, scale, own = self.stack.weights.tolist()
        beside = pairs.sums(self.answers.table.answer, len(of)) + self.features.of(self._vectors(looks.item))
        p = 1.0 / (1.0 + np.exp(-(c + scale * log_odds + own * back + level[of] + beside)))
        self._information[ids] += sums(of, p * (1.0 - p), len(ids))
        precision = self._information[ids] + 1.0 / WIDTHS[self.width]
        step = np.clip(sums(of, chosen - p, len(ids)) / precision, -_FURTHEST, _FURTHEST)
        self.stack.level[rows] += torch.from_numpy(step).to(rows.device, torch.float32)
        if self.answers.follow(pairs, chosen - p, p * (1.0 - p)):
            self._hand_over("answer")

    def _hand_over(self, *names: str) -> None:
        """Have the layer say what these columns of the table do: on the CPU they are the same memory."""
        for name in names:
            column = torch.from_numpy(getattr(self.answers.table, name))
            setattr(self.stack, name, column.to(self.stack.level.device))

    def fit(self) -> None:
        """Find the mode for what is kept."""
        self.fitted, kept = self.slots, slice(min(self.slots, NEWEST))
        ids, of, shown = np.unique(self._item[kept], return_inverse=True, return_counts=True)
        ids, of = _without(ids, of, shown < FEW)
        z = self._z[kept].astype(np.float64)
        middle = float(z.mean())
        columns = np.ones((len(z), 3))  # what c, κ and ω count
        columns[:, 1], columns[:, 2] = z - middle, self._back[kept]
        c, scale, own = self.stack.weights.tolist()
        start = np.array([c - middle * (1 - scale), scale, own])
        level = self.stack.level.cpu().numpy()[ids].astype(np.float64)
        chosen = self._chosen[kept]
        entered = self.answers.enter(Looks(self._item[kept], self._look[kept], self._root[kept]))
        least, share = LATELY
        count = min(self.slots, max(least, min(self.slots, NEWEST) // share))
        newest = (self.slots - count + np.arange(count)) % NEWEST
        vectors = self._vectors(self._item[kept])
        told = self.features.of(vectors)
        self._wider = not self._wider
        near = {self.width, min(max(0, self.width + (1 if self._wider else -1)), len(WIDTHS) - 1)}
        for _ in range(ROUNDS if len(entered.answer) else 1):
            beside = entered.pairs.sums(entered.answer, len(z))
            found = {
                width: _mode(columns, middle + beside + told, of, chosen, WIDTHS[width], start, level)
                for width in near
            }
            self.width = max(found, key=lambda width: (found[width].evidence, -width))
            best, near = found[self.width], {self.width}
            start, level = best.weights, best.level
            log_odds = middle + columns @ start + np.append(level, 0.0)[of] + beside
            self.features.settle(vectors[newest], log_odds[newest], chosen[newest])
            told = self.features.of(vectors)
            settled = self.answers.settle(entered, log_odds + told, chosen)
            entered = entered._replace(answer=settled.answer)
        self.answers.keep(entered, settled)
        self._hand_over(*Table._fields)
        c, scale, own = best.weights
        device = self.stack.level.device
        self.stack.weights.copy_(torch.tensor([c + middle * (1 - scale), scale, own]))
        self.stack.level.zero_()[torch.from_numpy(ids).to(device, torch.int64)] = torch.from_numpy(
            best.level
        ).to(device, torch.float32)
        self.stack.level[0] = 0.0
        self.stack.slope.copy_(torch.from_numpy(self.features.served))
        self._information[:] = 0.0
        self._information[ids] = best.information

    def variance(self, rows: int) -> Tensor:
        """[rows] how uncertain the first levels are."""
        return torch.from_numpy(1.0 / (self._information[:rows] + np.float32(1.0 / WIDTHS[self.width])))

    def reserve(self, items: int) -> None:
        """Grow the tables by id to so many rows."""
        more = items - len(self._information)
        self.stack.level = functional.pad(self.stack.level, (0, more))
        self._information = np.pad(self._information, (0, more))

    def state(self, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Everything, exactly; of tables by id the first rows. Copies."""
        kept = slice(min(self.slots, NEWEST))
        return {
            "counters": np.array([self.slots, self.fitted, self.width, self._wider], np.int64),
            "weights": self.stack.weights.cpu().numpy().copy(),
            "level": self.stack.level[:rows].cpu().numpy().copy(),
            "information": self._information[:rows].copy(),
            **self.answers.state(),
            **self.features.state(),
            **{name: getattr(self, f"_{name}")[kept].copy() for name in _RING},
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave; there is room for its rows."""
        self.slots, self.fitted, self.width, wider = state["counters"].tolist()
        self._wider = bool(wider)
        self.stack.weights.copy_(torch.from_numpy(state["weights"].copy()))
        self.stack.level.zero_()[: len(state["level"])] = torch.from_numpy(state["level"].copy())
        self._information[:] = 0.0
        self._information[: len(state["information"])] = state["information"]
        self.answers.restore(state)
        self.features.restore(state)
        self.stack.slope.copy_(torch.from_numpy(self.features.served))
        self._hand_over(*Table._fields)
        for name in _RING:
            getattr(self, f"_{name}")[: len(state[name])] = state[name]


_RING: Final = ("item", "z", "back", "chosen", "look", "root")


def _mode(
    features: Floats,
    offset: Floats | float,
    of: npt.NDArray[np.intp],
    chosen: npt.NDArray[np.bool_],
    width: float,
    weights: Floats,
    level: Floats,
) -> _Fitted:
    """Newton's steps from these weights [3] and levels [M]. features: [T, 3]; offset: [T] log-odds beside them; of: [T]
    whose level counts, M: nobody's."""
    items, k = len(level) + 1, features.shape[1]
    free = np.append(np.full(len(level), 1.0 / width), np.inf)  # precision of the priors
    level = np.append(level, 0.0)
    for _ in range(_MOST_STEPS):
        p = 1.0 / (1.0 + np.exp(-(offset + features @ weights + level[of])))
        error, told = chosen - p, p * (1.0 - p) + 1e-9
        information = sums(of, told, items)
        own = information + free  # the diagonal of the levels
        pull = sums(of, error, items) - level / width
        both = np.stack([sums(of, told * features[:, i], items) for i in range(k)], axis=1)  # [M, k]
        curvature = (features * told[:, None]).T @ features + np.diag(PRIOR_PRECISION)
        curvature -= both.T @ (both / own[:, None])  # what is left when the levels follow
        slope = features.T @ error - PRIOR_PRECISION * (weights - PRIOR_MEAN) - both.T @ (pull / own)
        step = np.clip(np.linalg.solve(curvature, slope), -_FURTHEST, _FURTHEST)
        each = np.clip((pull - both @ step) / own, -_FURTHEST, _FURTHEST)
        weights, level = weights + step, level + each
        if max(np.abs(step).max(), np.abs(each).max()) < _NEAR:
            break
    log_odds = offset + features @ weights + level[of]
    likelihood = -np.logaddexp(0.0, np.where(chosen, -log_odds, log_odds)).sum()
    prior = 0.5 * (PRIOR_PRECISION @ (weights - PRIOR_MEAN) ** 2 + (level @ level) / width)
    volume = 0.5 * (np.log(own[:-1] * width).sum() + np.linalg.slogdet(curvature)[1])
    return _Fitted(weights, level[:-1], information[:-1], float(likelihood - prior - volume))


def _without(
    ids: npt.NDArray[np.int32], of: npt.NDArray[np.intp], few: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """The other ids [M], and of whom each slot is now; M: of none of them."""
    place = np.cumsum(~few) - 1
    place[few] = np.count_nonzero(~few)
    return ids[~few], place[of]
