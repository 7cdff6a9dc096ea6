"""The device counters: against plain counting, under torch.compile, and inside CUDA graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="counters live in torch tensors")

from moe_placement_plugin.recording.counters import LoadCounters  # noqa: E402

LAYERS, EXPERTS, TOP_K = 3, 16, 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Batch:
    """Hold random choices, and what counting them by hand gives."""

    def __init__(self, tokens: list[int], prefill: list[bool], padding: int = 0, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.tokens, self.prefill = np.array(tokens), np.array(prefill)
        total = int(self.tokens.sum())
        tokens = LAYERS * (total + padding)
        ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)], dtype=np.int32)
        self.ids = ids.reshape(LAYERS, total + padding, TOP_K)
        self.counts = np.zeros((2, LAYERS, EXPERTS), dtype=np.int64)
        self.pairs = np.zeros((LAYERS, EXPERTS, EXPERTS), dtype=np.int64)
        phase = np.repeat(np.where(self.prefill, 0, 1), self.tokens)
        for layer in range(LAYERS):
            for position in range(total):
                chosen = self.ids[layer, position]
                self.counts[phase[position], layer, chosen] += 1
                self.pairs[layer][np.ix_(chosen, chosen)] += 1
            np.fill_diagonal(self.pairs[layer], 0)


def run(counters: LoadCounters, batch: Batch, device: str = "cpu") -> None:
    counters.mark(batch.tokens, batch.prefill)
    for layer in range(LAYERS):
        counters.count(layer, torch.from_numpy(batch.ids[layer]).to(device))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_counts_pairs_phases_and_padding(device):
    counters = LoadCounters(LAYERS, EXPERTS, 64, device, coactivation=True)
    # A mixed batch, a smaller one (its padding lies where the first had tokens), and decode only.
    batches = [
        Batch([5, 1, 7], [True, False, True], 3, 1),
        Batch([2, 1], [True, False], 9, 2),
        Batch([1] * 6, [False] * 6, 2, 3),
    ]
    for batch in batches:
        run(counters, batch, device)
    counts, pairs = counters.snapshot()
    np.testing.assert_array_equal(counts, sum(b.counts for b in batches))
    np.testing.assert_array_equal(pairs, sum(b.pairs for b in batches))


def test_the_hosts_own_way_counts_alike():
    plain, fast = (LoadCounters(LAYERS, EXPERTS, 64, "cpu") for _ in range(2))
    plain._on_host = plain._kept = None
    for seed in range(5):
        batch = Batch([seed + 1, 1, 3], [True, False, True], seed, seed)
        run(plain, batch)
        run(fast, batch)
    np.testing.assert_array_equal(plain.snapshot()[0], fast.snapshot()[0])
    assert fast.snapshot()[0].sum() > 0


def test_snapshots_beside_the_host_lose_and_double_nothing():
    """Batches of one shape, of others, and too large to be kept, while snapshots are taken."""
    counters, taken, done = LoadCounters(LAYERS, EXPERTS, 600, "cpu"), [], threading.Event()
    counters.mark(np.array([1]), np.array([False]))

    def watch():
        while not done.is_set():
            taken.append(counters.snapshot()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    batches = [Batch([1] * 7, [False] * 7, 0, seed) for seed in range(100)]
    batches += [
        Batch([seed % 300 + 1, 2], [True, False], seed % 3, seed) for seed in range(0, 900, 45)
    ]
    try:
        with torch.inference_mode():
            for batch in batches:
                run(counters, batch)
    finally:
        done.set()
        thread.join()
    np.testing.assert_array_equal(counters.snapshot()[0], sum(b.counts for b in batches))
    assert len(taken) > 3 and all(
        (later >= earlier).all() for earlier, later in zip(taken, taken[1:])
    )


def test_dummy_batches_do_not_count():
    counters = LoadCounters(LAYERS, EXPERTS, 64, "cpu")
    batch = Batch([4], [True])
    for layer in range(LAYERS):  # before any request: profiling, graph capture
        counters.count(layer, torch.from_numpy(batch.ids[layer]))
    assert not counters.snapshot()[0].any()
    run(counters, batch)
    counters.mark_uncounted()
    for layer in range(LAYERS):
        counters.count(layer, torch.from_numpy(batch.ids[layer]))
    np.testing.assert_array_equal(counters.snapshot()[0], batch.counts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint32])
def test_ids_outside_the_experts_are_left_out(dtype, pairs, device):
    """-1 marks skipped tokens, fused shared experts lie behind the last, packed ids are huge."""
    counters = LoadCounters(1, 4, 8, device, coactivation=pairs)
    counters.mark(np.array([2]), np.array([False]))
    rows = [[0, 3, 4], [1, 2, 5]] if dtype == torch.uint32 else [[0, 3, 4], [-1, 2, 30000]]
    counters.count(0, torch.tensor(rows).to(dtype).to(device))
    counts, together = counters.snapshot()
    assert (
        counts[1, 0].tolist() == ([1, 1, 1, 1] if dtype == torch.uint32 else [1, 0, 1, 1])
        and not counts[0].any()
    )
    assert (together[0, 0, 3] == together[0, 3, 0] == 1) if pairs else together is None


def test_more_tokens_than_expected_do_no_harm():
    counters = LoadCounters(1, 4, 3, "cpu")
    counters.mark(np.array([9]), np.array([True]))
    counters.count(0, torch.zeros((9, 2), dtype=torch.int32))
    assert counters.snapshot()[0].sum() == 6


def test_share_of_a_batch():
    """Sequence parallelism: each rank counts its rows by their position in the batch."""
    batch = Batch([3, 2], [True, False])
    counters = LoadCounters(LAYERS, EXPERTS, 64, "cpu")
    counters.mark(batch.tokens, batch.prefill)
    for layer in range(LAYERS):
        ids = torch.from_numpy(batch.ids[layer])
        counters.count(layer, ids[:3], first=0)
        counters.count(layer, ids[3:], first=3)
    np.testing.assert_array_equal(counters.snapshot()[0], batch.counts)


def test_compiled_without_a_graph_break():
    counters = LoadCounters(LAYERS, EXPERTS, 64, "cpu")

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x):
        ids = x.topk(TOP_K, dim=-1).indices
        counters.count(0, ids)
        return ids

    for tokens in (3, 5, 8):
        x = torch.randn(tokens, EXPERTS)
        counters.mark(np.array([tokens]), np.array([False]))
        before = counters.snapshot()[0]
        ids = step(x)
        gained = counters.snapshot()[0] - before
        np.testing.assert_array_equal(
            gained[1, 0], np.bincount(ids.flatten().numpy(), minlength=EXPERTS)
        )


@needs_gpu
def test_cuda_graph_replays_count_while_snapshots_are_taken():
    size = 32
    counters = LoadCounters(LAYERS, EXPERTS, 256, "cuda", coactivation=True)
    ids = torch.zeros((LAYERS, size, TOP_K), dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for layer in range(LAYERS):
            counters.count(layer, ids[layer])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            counters.count(layer, ids[layer])
    assert not counters.snapshot()[0].any(), "warm-up and capture must not count"

    stop, seen = threading.Event(), []

    def watch():
        while not stop.is_set():
            seen.append(counters.snapshot()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    expected, pairs = (
        np.zeros((2, LAYERS, EXPERTS), np.int64),
        np.zeros((LAYERS, EXPERTS, EXPERTS), np.int64),
    )
    rng = np.random.default_rng(0)
    for step in range(300):
        real = int(rng.integers(1, size + 1))
        batch = Batch([1] * real, [bool(b) for b in rng.integers(0, 2, real)], size - real, step)
        ids.copy_(torch.from_numpy(batch.ids))
        counters.mark(batch.tokens, batch.prefill)
        graph.replay()
        expected += batch.counts
        pairs += batch.pairs
    torch.cuda.synchronize()
    stop.set()
    watcher.join()
    counts, got_pairs = counters.snapshot()
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(got_pairs, pairs)
    assert len(seen) > 3 and all((b >= a).all() for a, b in zip(seen, seen[1:])), "counts only grow"


@needs_gpu
def test_counting_never_waits_for_the_device():
    counters = LoadCounters(LAYERS, EXPERTS, 256, "cuda")
    ids = torch.zeros((8, TOP_K), dtype=torch.int32, device="cuda")
    counters.mark(np.array([8]), np.array([True]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        counters.mark(np.array([8]), np.array([True]))
        counters.count(0, ids)
        counters.mark_uncounted()
    finally:
        torch.cuda.set_sync_debug_mode("default")
