"""The layer under choice: it rests at the mode of the posterior, and what nobody speaks of fades."""

from __future__ import annotations

import pytest
import torch

from learner.response import PACE, PULL_WIDTH, SMALLEST, WIDTHS, Fit, Response, Shown

D, ITEMS, STEPS, SLOTS = 4, 6, 80, 3
ENTRIES, KINDS, CHANNELS = 5, 3, 2


class Log:
    """A replay of slates, all of it one batch, of items 1..5; item 0 fills what is left of them."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.phi = torch.randn(STEPS, D, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 0.1]) + 1.0
        self.tower = torch.randn(ITEMS, D, generator=generator) - 0.5
        self.organic = torch.randn(ITEMS, D, generator=generator)
        self.ids = torch.randint(1, ITEMS, (STEPS, SLOTS), generator=generator)
        self.weight = torch.full((STEPS, SLOTS), 1.0)
        self.ids[:20, 1:], self.weight[:20, 1:] = 0, 0.0
        self.log_odds = torch.randn(STEPS, SLOTS, generator=generator) - 2.0  # without the layer
        self.chosen = torch.rand(STEPS, SLOTS, generator=generator) < 0.3
        self.kinds = torch.randint(KINDS, (STEPS, ENTRIES), generator=generator)
        self.share = torch.rand(STEPS, ENTRIES, CHANNELS, generator=generator)
        self.same = torch.rand(STEPS, SLOTS, ENTRIES, generator=generator) < 0.2
        self.alike = self.same | (torch.rand(STEPS, SLOTS, ENTRIES, generator=generator) < 0.4)

    def shown(self, response):
        """As the network would see it, with the layer as it stands."""
        keys = response.keys(self.tower, response.own)[self.ids]  # [B, K, d + 1]
        query = torch.cat((self.phi, torch.ones(STEPS, 1)), dim=1)
        pulls = self.same * response.copy[self.kinds].unsqueeze(1)
        pulls = pulls + self.alike * (response.alike[self.kinds] + self.share @ response.share).unsqueeze(1)
        log_odds = self.log_odds + torch.einsum("bkd,bd->bk", keys, query) + pulls.sum(dim=2)
        return Shown(
            *(self.phi, self.tower[self.ids], self.organic[self.ids], self.ids),
            *(self.chosen, torch.sigmoid(log_odds), self.weight, torch.zeros_like(self.weight)),
            *(self.kinds, self.share, self.same, self.alike),
        )


def layer(d=D, items=ITEMS):
    return Response(d, items, KINDS, CHANNELS)


def fitted(log, passes, share=1.0):
    fit = Fit(layer())
    for _ in range(round(passes / share)):
        fit.learn(log.shown(fit.response)._replace(weight=log.weight * share), share)
        fit.catch_up()
    return fit


@pytest.mark.parametrize("share", [0.25, 0.02])
def test_it_rests_where_each_number_is_what_its_prior_and_the_whole_replay_make_of_it(share):
    log = Log(1)
    fit = fitted(log, 60, share)
    response, shown = fit.response, log.shown(fit.response)
    phi = (log.phi - response.state_mean) / response.state_scale
    psi = (shown.tower - response.item_mean) / response.item_scale
    error = log.weight * (log.chosen.float() - shown.chance)  # [B, K]
    towards = phi @ fit.directions
    level, slope = torch.zeros(ITEMS), torch.zeros(ITEMS, D)
    for b in range(STEPS):
        for k in range(SLOTS):
            level[log.ids[b, k]] += WIDTHS[0] * error[b, k]
            slope[log.ids[b, k]] += WIDTHS[1] * error[b, k] * towards[b]
    copy, alike = torch.zeros(KINDS), torch.zeros(KINDS)
    for kind in range(KINDS):
        entries = (log.kinds == kind).float()
        copy[kind] = PULL_WIDTH * torch.einsum("bk,bkh,bh->", error, log.same.float(), entries)
        alike[kind] = PULL_WIDTH * torch.einsum("bk,bkh,bh->", error, log.alike.float(), entries)
    channel = PULL_WIDTH * torch.einsum("bk,bkh,bhc->c", error, log.alike.float(), log.share)
    mean = WIDTHS[2] * torch.einsum("bk,bkj->j", error, psi)
    product = WIDTHS[3] * torch.einsum("bk,bi,bkj->ij", error, towards, psi)
    for name, rests, mode in (
        ("b", response.own[:, -1], level),
        ("w", response.own[:, :-1], slope),
        ("μ", response.shared[-1], mean),
        ("M", response.shared[:-1], product),
        ("copy", response.copy, copy),
        ("alike", response.alike, alike),
        ("share", response.share, channel),
    ):
        assert mode.abs().max() > (1e-5 if len(mode) <= KINDS else 1e-3)
        # a step takes its share of the prior after its gradient, so that it rests a little beside the mode
        torch.testing.assert_close(rests, mode, rtol=share, atol=share * float(mode.abs().max()), msg=name)


def test_one_click_more_or_less_moves_an_item_little_and_a_thousand_move_it_far():
    log = Log(2)
    log.log_odds[:] = -2.0
    log.ids[:], log.weight[:] = 1, 1.0
    log.same[:], log.alike[:] = False, False

    def level(clicks, times):
        log.chosen[:] = torch.arange(STEPS * SLOTS).reshape(STEPS, SLOTS) < clicks
        fit = Fit(layer())
        log.phi[:] = 1.0  # all users alike
        for _ in range(400):
            fit.learn(log.shown(fit.response)._replace(weight=log.weight * times * 0.1), 0.1)
            fit.catch_up()
        return float(fit.response.own[1, -1])

    expected = STEPS * SLOTS * torch.sigmoid(torch.tensor(-2.0))  # 28.6 clicks
    assert abs(level(29, 1)) < 0.01
    assert 0.01 < level(38, 1) < 0.1  # ten more, of which a click-through rate would make .28
    assert level(38, 300) == pytest.approx(
        float(torch.log(38 / expected / (1 - 38 / 240) * (1 - expected / 240))), abs=0.03
    )


def test_where_all_that_was_shown_is_alike_what_is_unlike_it_is_not_thousands_off():
    log = Log(2)
    log.phi[:], log.tower[:] = 1.0, 1.0
    response = fitted(log, 5).response
    unlike = torch.full((1, D), 1.5)  # as far off as vectors are from each other, or nearer
    assert response.of_state(unlike).norm() == pytest.approx(1.0 / SMALLEST, rel=1e-4)
    assert response.of_item(unlike).norm() == pytest.approx(1.0 / SMALLEST, rel=1e-4)
    own = torch.cat((torch.full((ITEMS, D), 0.1), torch.zeros(ITEMS, 1)), dim=1)
    query = torch.cat((unlike, torch.ones(1, 1)), dim=1)
    assert (response.keys(log.tower, own) @ query.T).abs().max() < 2.0  # log-odds


def test_items_that_are_not_shown_stand_where_interest_alone_puts_them():
    log = Log(3)
    log.ids[log.ids == 5] = 4
    fit = fitted(log, 5)
    assert not fit.response.own[5].any()
    assert not fit.response.own[0].any()
    assert fit.response.own[4].any()


def test_what_priors_take_back_goes_as_fast_as_steps_however_much_of_replay_a_batch_is():
    """Where batches are large beside replay neither goes further than all of replay asks for."""

    def level(share):
        fit = fitted(Log(1), 60, share)
        return fit.response.own[1:, -1].norm(), fit.response.copy.norm(), fit.response.shared[-1].norm()

    for all_of_it, third in zip(level(1.0), level(1 / PACE), strict=True):
        assert float(all_of_it) == pytest.approx(float(third), rel=0.15)


def test_a_checkpoint_in_which_all_faded_at_one_pace_is_gone_on_from():
    fit, nobody = fitted(Log(4), 2, share=0.1), Log(4)
    nobody.weight = nobody.weight * 0.0
    for _ in range(10):
        fit.learn(nobody.shown(fit.response), 0.1)  # rows lie behind
    state = fit.state(ITEMS)
    state["passes"], state["at"] = state["passes"][:3], state["at"][:, 0].contiguous()
    again = Fit(layer())
    again.restore(state)
    torch.testing.assert_close(again.own_now(ITEMS), fit.own_now(ITEMS))
    torch.testing.assert_close(again.variance(ITEMS), fit.variance(ITEMS))
    for each in (again, fit):
        each.catch_up()
        each.learn(Log(4).shown(each.response), 0.1)
    torch.testing.assert_close(again.own_now(ITEMS), fit.own_now(ITEMS))


def test_rows_fade_alike_whether_they_are_read_often_or_once():
    often, once = fitted(Log(4), 2), fitted(Log(4), 2)
    nobody = Log(4)
    nobody.weight = nobody.weight * 0.0
    nobody.ids = torch.zeros_like(nobody.ids)
    before = once.response.own.clone()
    information = once.information.clone()
    for _ in range(10):
        often.learn(nobody.shown(often.response), 0.001)
        often.catch_up()
        once.learn(nobody.shown(once.response), 0.001)
    expected = once.served(ITEMS)["own"]
    assert torch.equal(once.response.own, before)  # looking changes nothing
    once.catch_up()
    assert torch.equal(once.response.own, expected)
    torch.testing.assert_close(often.response.own, once.response.own, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(once.information, information * torch.exp(torch.tensor(-0.01)))
    kept = once.response.own[1:, -1] / before[1:, -1]
    fading = 1 / WIDTHS[0] / (information[1:, 0] + 1 / WIDTHS[0])
    torch.testing.assert_close(kept, torch.exp(-PACE * 0.01 * fading))


def test_a_batch_without_slates_teaches_nothing():
    fit = fitted(Log(5), 1)
    before = fit.state(ITEMS)
    nobody = Log(6)
    nobody.weight = nobody.weight * 0.0
    fit.learn(nobody.shown(fit.response), 0.1)
    after = fit.state(ITEMS)
    (passes, *looked, paced), (passes_before, *looked_before, paced_before) = (
        x.pop("passes").tolist() for x in (after, before)
    )
    assert passes == pytest.approx(passes_before + 0.1)
    assert paced == pytest.approx(paced_before + 0.1 * PACE)
    assert looked == looked_before
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_until_there_are_slates_moments_are_of_what_users_went_to_unaided_and_move_on_from_there():
    log, slates = Log(6), Log(8)
    unaided, fit = log.weight, Fit(layer())
    log.weight = log.weight * 0.0
    for _ in range(30):
        fit.learn(log.shown(fit.response)._replace(unaided=unaided), 0.1)
    assert fit.looked == 0
    before = unaided.sum(dim=1) @ log.phi / unaided.sum()
    torch.testing.assert_close(fit.response.state_mean, before)
    fit.learn(slates.shown(fit.response), 0.1)
    there = slates.weight.sum(dim=1) @ slates.phi / slates.weight.sum()
    torch.testing.assert_close(fit.response.state_mean, before.lerp(there, 0.1))
    moved = fit.response.state_mean.clone()
    fit.learn(log.shown(fit.response)._replace(unaided=unaided), 0.1)  # from now on it tells of slates
    assert torch.equal(fit.response.state_mean, moved)


def test_the_first_slates_are_looked_at_with_fresh_eyes_however_long_there_were_none():
    nobody, log = Log(6), Log(8)
    nobody.weight = nobody.weight * 0.0
    late, early = Fit(layer()), Fit(layer())
    for _ in range(30):
        late.learn(nobody.shown(late.response), 0.1)
    for fit in (early, late):
        fit.learn(log.shown(fit.response), 0.1)
    mean = log.weight.sum(dim=1) @ log.phi / log.weight.sum()
    torch.testing.assert_close(late.response.state_mean, mean)
    for name, value in early.response.state_dict().items():
        torch.testing.assert_close(late.response.state_dict()[name], value, msg=name)


def test_it_grows_and_comes_back_as_it_was():
    fit = fitted(Log(7), 3)
    own = fit.response.own.clone()
    fit.reserve(20)
    assert torch.equal(fit.response.own[:ITEMS], own)
    assert not fit.response.own[ITEMS:].any()
    assert (fit.at == torch.tensor([fit.passes, fit.paced])).all()  # nothing to fade yet
    again = Fit(layer(D, 30))
    again.restore(fit.state(20))
    for name, value in fit.state(20).items():
        assert torch.equal(again.state(20)[name], value), name
    with pytest.raises(ValueError, match="settings differ"):
        Fit(layer(D + 1, 30)).restore(fit.state(20))
