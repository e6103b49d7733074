"""The same figures of dm-reverb, in the Python that has it: what `python -m benchmarks.replay --reverb-python` runs.

    PATH/python benchmarks/reverb_peer.py --transitions 20000 --history 32 --batch 1024

Its server runs in this process, with as many threads as it likes. A transition is what the plain ring stores: two
states and four numbers, inserted by one trajectory writer, drawn with priorities by its dataset. Needs nothing of ours
but `pip install 'dm-reverb[tensorflow]'`, in an environment of its own: it pins TensorFlow. Prints one line of JSON.
"""

import argparse
import json
import time

import numpy as np
import reverb
import tensorflow as tf

TABLE = "replay"
STATE = {"item": np.int32, "name": np.uint8, "age_s": np.float32, "value": np.float32}
NUMBERS = ("action", "reward", "discount", "propensity")


def transition(history, rng):
    """One, of fresh numbers."""
    states = {
        f"{which}_{field}": rng.integers(0, 100, history).astype(dtype)
        for which in ("state", "next")
        for field, dtype in STATE.items()
    }
    return states | {name: np.float32(rng.random()) for name in NUMBERS}


def server(transitions, example):
    """A prioritised table of this size."""
    signature = {name: tf.TensorSpec(value.shape, value.dtype, name) for name, value in example.items()}
    table = reverb.Table(
        TABLE,
        sampler=reverb.selectors.Prioritized(0.6),
        remover=reverb.selectors.Fifo(),
        max_size=transitions,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )
    return reverb.Server([table])


def insert(client, rows, rng):
    """Transitions a second."""
    start = time.perf_counter()
    with client.trajectory_writer(num_keep_alive_refs=1) as writer:
        for row in rows:
            writer.append(row)
            last = {name: column[-1] for name, column in writer.history.items()}
            writer.create_item(TABLE, float(rng.random()) + 0.1, last)
    return len(rows) / (time.perf_counter() - start)


def sample(port, batch, batches):
    """(transitions a second, keys of the last batch)."""
    dataset = reverb.TrajectoryDataset.from_table_signature(
        f"localhost:{port}", TABLE, max_in_flight_samples_per_worker=batch
    )
    drawn = iter(dataset.batch(batch))
    for _ in range(3):
        next(drawn)
    start = time.perf_counter()
    for _ in range(batches):
        last = next(drawn)
    seconds = time.perf_counter() - start
    return batch * batches / seconds, last.info.key.numpy()


def update_priorities(client, keys, times):
    """Transitions a second."""
    start = time.perf_counter()
    for _ in range(times):
        client.mutate_priorities(TABLE, {int(key): 0.5 for key in keys})
    return len(keys) * times / (time.perf_counter() - start)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transitions", type=int, default=20_000)
    parser.add_argument("--history", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [transition(options.history, rng) for _ in range(options.transitions)]
    running = server(options.transitions, rows[0])
    client = reverb.Client(f"localhost:{running.port}")
    inserted = insert(client, rows, rng)
    sampled, keys = sample(running.port, options.batch, 30)
    figures = {
        "insert_per_s": inserted,
        "sample_per_s": sampled,
        "update_priorities_per_s": update_priorities(client, keys, 10),
    }
    running.stop()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
