"""What obp, the Open Bandit Pipeline, estimates, and from what; run by a Python that has obp 0.4.1: FOLDER SEED.

Writes a file for each log into FOLDER: the arrays, and obp's estimates by name. See benchmarks/ope_peer.py.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import obp.ope as ope
import pandas as pd
from obp.dataset import OpenBanditDataset, SyntheticSlateBanditDataset, logistic_reward_function
from obp.ope import RegressionModel
from obp.policy import BernoulliTS, Random
from obp.version import __version__
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import LabelEncoder

TAUS = (0.5, 1.0, 2.0, 5.0, 20.0)
PEERS = {
    "IPS": ope.InverseProbabilityWeighting(),
    "SNIPS": ope.SelfNormalizedInverseProbabilityWeighting(),
    "DM": ope.DirectMethod(),
    "DR": ope.DoublyRobust(),
    "SNDR": ope.SelfNormalizedDoublyRobust(),
    **{f"switch-DR {tau:g}": ope.SwitchDoublyRobust(tau=tau) for tau in TAUS},
}


class Dataset(OpenBanditDataset):
    """obp's own loader, in words that today's pandas understands."""

    def pre_process(self) -> None:
        users = self.data.columns.str.contains("user_feature")
        self.context = pd.get_dummies(self.data.loc[:, users], drop_first=True).values
        kinds = self.item_context.drop(columns="item_feature_0").apply(LabelEncoder().fit_transform)
        self.action_context = pd.concat([kinds, self.item_context["item_feature_0"]], axis=1).values


def single_items(folder: Path, campaign: str, behaviour: str, target: str, seed: int) -> None:
    """One of the logs that come with obp: 10,000 impressions."""
    feedback = Dataset(behavior_policy=behaviour, campaign=campaign).obtain_batch_bandit_feedback()
    given = {name: feedback[name] for name in ("reward", "action", "pscore", "position")}
    chances = chances_of(target, campaign, feedback, seed)  # [T, actions, 3]
    q = reward_model(feedback, chances, seed)  # [T, actions, 3]
    t = np.arange(feedback["n_rounds"])
    at = t, given["action"], given["position"]
    estimates = {}
    for name, peer in PEERS.items():
        modelled = {"estimated_rewards_by_reg_model": q} if "D" in name else {}
        estimates[name] = peer.estimate_policy_value(**given, action_dist=chances, **modelled)
    write(
        folder / f"{campaign}, {behaviour} judges {target}",
        estimates,
        reward=given["reward"][:, None],
        propensity=given["pscore"][:, None],
        chance=chances[at][:, None],
        q_shown=q[at][:, None],
        q_target=(q * chances).sum(axis=1)[t, given["position"]][:, None],
    )


def chances_of(policy: str, campaign: str, feedback: Any, seed: int) -> Any:
    """[T, actions, 3] of the target policy, as obp computes them."""
    sizes = {"n_actions": feedback["n_actions"], "len_list": 3, "random_state": seed}
    if policy == "random":
        return Random(**sizes).compute_batch_action_dist(n_rounds=feedback["n_rounds"])
    sampler = BernoulliTS(**sizes, is_zozotown_prior=True, campaign=campaign)
    return sampler.compute_batch_action_dist(n_rounds=feedback["n_rounds"], n_sim=10_000)


def reward_model(feedback: Any, chances: Any, seed: int) -> Any:
    """[T, actions, 3] what obp's cross-fitted regression expects."""
    model = RegressionModel(
        n_actions=feedback["n_actions"],
        len_list=3,
        action_context=feedback["action_context"],
        base_model=LogisticRegression(max_iter=1000, random_state=seed),
    )
    names = ("context", "action", "reward", "pscore", "position")
    given = {name: feedback[name] for name in names}
    return model.fit_predict(**given, action_dist=chances, n_folds=2, random_state=seed)


def slates(folder: Path, seed: int) -> None:
    """obp's synthetic slates of 3 out of 10: for each slate model the probabilities that it wants of each slot."""
    data = SyntheticSlateBanditDataset(
        n_unique_action=10,
        len_list=3,
        dim_context=2,
        reward_type="binary",
        random_state=seed,
        click_model="cascade",
        reward_structure="cascade_additive",
        base_reward_function=logistic_reward_function,
    )
    feedback = data.obtain_batch_bandit_feedback(n_rounds=2000)
    whole, marginal, cascade = data.generate_evaluation_policy_pscore(
        evaluation_policy_type="optimal", context=feedback["context"], action=feedback["action"], epsilon=0.3
    )
    given = {name: feedback[name] for name in ("slate_id", "reward", "position")}
    by_model = {
        "standard": ope.SlateStandardIPS(len_list=3).estimate_policy_value(
            **given, pscore=feedback["pscore"], evaluation_policy_pscore=whole
        ),
        "cascade": ope.SlateRewardInteractionIPS(len_list=3).estimate_policy_value(
            **given, pscore_cascade=feedback["pscore_cascade"], evaluation_policy_pscore_cascade=cascade
        ),
        "slotwise": ope.SlateIndependentIPS(len_list=3).estimate_policy_value(
            **given,
            pscore_item_position=feedback["pscore_item_position"],
            evaluation_policy_pscore_item_position=marginal,
        ),
    }
    for slate, said in by_model.items():
        own, past = cascade, feedback["pscore_cascade"]
        chance, propensity = (by_slot(x.reshape(-1, 3)) for x in (own, past))
        if slate == "slotwise":  # one formula, other weights: obp gives it marginal propensities
            chance, propensity = marginal.reshape(-1, 3), feedback["pscore_item_position"].reshape(-1, 3)
        reward = feedback["reward"].reshape(-1, 3)
        nothing = np.zeros(reward.shape)
        write(
            folder / f"synthetic slates, {slate}",
            {"IPS": said},
            reward=reward,
            propensity=propensity,
            chance=chance,
            q_shown=nothing,
            q_target=nothing,
        )


def by_slot(joint: Any) -> Any:
    """[T, K] of each slot, from that of all slots up to it."""
    return np.concatenate((joint[:, :1], joint[:, 1:] / joint[:, :-1]), axis=1)


def write(file: Path, estimates: dict[str, Any], **arrays: Any) -> None:
    names = list(estimates)
    said = np.array([float(estimates[name]) for name in names])
    np.savez(f"{file}.npz", names=np.array(names), said=said, version=np.array(__version__), **arrays)


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")  # obp's, about libraries that it was not written for
    logging.disable(logging.INFO)
    for campaign in ("all", "men", "women"):
        single_items(folder, campaign, "random", "bts", seed)
        single_items(folder, campaign, "bts", "random", seed)
    slates(folder, seed)


if __name__ == "__main__":
    main()
