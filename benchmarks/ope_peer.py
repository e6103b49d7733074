"""Are our off-policy estimators those of obp, the Open Bandit Pipeline (Saito et al. 2020), to the last digits?

    python -m benchmarks.ope_peer --obp PYTHON [--json FILE]

PYTHON is that of a virtual environment of its own with `pip install obp==0.4.1`. The data are the samples that come
with obp: six logs of 10,000 impressions at ZOZOTOWN, of the random policy and of Bernoulli Thompson sampling ("bts"),
in three campaigns; nothing is downloaded. Each log judges the other's policy. The reward model is obp's, a logistic
regression, cross-fitted. For slates, whose estimators the sample has no data for, obp's synthetic slates: our
`slotwise` is then fed marginal propensities, which makes it obp's IIPS. Every difference is printed; the exit status
is 1 if one exceeds 1e-9.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.other_python import arguments_without
from learner.estimators import (
    SLATE_MODELS,
    Estimator,
    dm,
    dr,
    ips,
    ratios,
    rounds,
    sndr,
    snips,
    sums,
    switch_dr,
)

MOST = 1e-9
PEER = Path(__file__).parent / "peers" / "obp_estimates.py"
OURS: dict[str, Estimator] = {"IPS": ips, "SNIPS": snips, "DM": dm, "DR": dr, "SNDR": sndr}


def compared(file: Path) -> Iterator[dict[str, Any]]:
    """A row for each estimate of one log."""
    with np.load(file) as log:
        arrays = {name: log[name] for name in log.files}
    shown = np.ones(arrays["reward"].shape, np.bool_)
    slate = next((model for model in SLATE_MODELS if file.stem.endswith(model)), "cascade")
    made = rounds(
        slate,
        ratios(arrays["chance"], arrays["propensity"], shown),
        shown,
        arrays["reward"].astype(np.float64),
        arrays["q_shown"],
        arrays["q_target"],
    )
    for name, said in zip(arrays["names"].tolist(), arrays["said"].tolist(), strict=True):
        method, _, tau = name.partition(" ")
        estimate = OURS.get(method, switch_dr(0))
        mine = sums(made, np.zeros(len(shown), np.int64), 1, taus=[float(tau or "inf")])
        ours = float(estimate(mine)[0])
        yield {"log": file.stem, "estimator": name, "ours": ours, "obp": said, "difference": abs(ours - said)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--obp", required=True, metavar="PYTHON", help="a Python that has obp 0.4.1")
    parser.add_argument("--seed", type=int, default=12345, help="of obp's simulations and folds [12345]")
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.obp, PEER, folder, str(options.seed)], check=True)
        files = sorted(Path(folder).glob("*.npz"))
        version = str(np.load(files[0])["version"])
        print("| log | estimator | ours | obp | difference |\n|---|---|---|---|---|")
        for file in files:
            for row in compared(file):
                rows.append(row)
                print(
                    f"| {row['log']} | {row['estimator']} | {row['ours']:.10f} | {row['obp']:.10f} | "
                    f"{row['difference']:.1e} |"
                )
    largest = max(row["difference"] for row in rows)
    print(f"largest difference to obp {version}: {largest:.1e}")
    about = {"obp": version, "largest": largest, "rows": rows}
    record.append(options.json, "ope_peer", arguments_without(options.obp), about)
    return int(not largest <= MOST)


if __name__ == "__main__":
    sys.exit(main())
