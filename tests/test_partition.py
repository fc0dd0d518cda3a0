"""The exact balanced assignment, and the balanced k-means on top of it."""

import itertools
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from sadmoe._partition import MAX_COST, assign
from sadmoe.partition import inertia, partition, slots
from torch import Tensor


def random_costs(f: int, experts: int, seed: int = 0, high: int = 1 << 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(-high, high, (f, experts), dtype=np.int32, endpoint=True)


def total(cost: np.ndarray, labels: np.ndarray) -> int:
    return int(np.take_along_axis(cost, labels[:, None], 1).astype(np.int64).sum())


def assert_balanced(labels: np.ndarray, experts: int) -> None:
    assert np.bincount(labels, minlength=experts).tolist() == [len(labels) // experts] * experts


def assert_proved_optimal(cost: np.ndarray, labels: np.ndarray, prices: np.ndarray) -> None:
    """Balanced, and every row where its priced cost is least: no balanced labelling can then cost less."""
    assert_balanced(labels, cost.shape[1])
    priced = cost.astype(np.int64) + prices
    assert (np.take_along_axis(priced, labels[:, None], 1)[:, 0] == priced.min(1)).all()


def linear_sum_assignment_cost(cost: np.ndarray) -> int:
    """The optimum by scipy: every expert repeated once for each of its places."""
    optimize = pytest.importorskip("scipy.optimize", reason="the peer solver is in the test extra")
    places = np.repeat(cost, cost.shape[0] // cost.shape[1], axis=1).astype(np.int64)
    return int(places[optimize.linear_sum_assignment(places)].sum())


def min_cost_flow_cost(cost: np.ndarray) -> int:
    """The optimum by OR-tools: one unit of flow from every row, f / E into every expert."""
    graph = pytest.importorskip(
        "ortools.graph.python.min_cost_flow", reason="the peer solver is in the test extra"
    )
    (f, experts), flow = cost.shape, graph.SimpleMinCostFlow()
    rows, sinks = np.divmod(np.arange(f * experts), experts)
    ones = np.ones(f * experts, dtype=np.int64)
    flow.add_arcs_with_capacity_and_unit_cost(rows, f + sinks, ones, cost.ravel().astype(np.int64))
    flow.set_nodes_supplies(np.arange(f), np.ones(f, dtype=np.int64))
    flow.set_nodes_supplies(f + np.arange(experts), np.full(experts, -(f // experts)))
    assert flow.solve() == flow.OPTIMAL
    return flow.optimal_cost()


PEERS = {"scipy": linear_sum_assignment_cost, "ortools": min_cost_flow_cost}
PROBLEMS = {
    "one row": random_costs(1, 1),
    "one expert": random_costs(7, 1),
    "an expert a row": random_costs(60, 60),
    "pairs": random_costs(80, 40),
    "few experts": random_costs(120, 3),
    "past a block of 64 experts": random_costs(130, 65),
    "ties everywhere": random_costs(120, 24, high=2),
    "all the same": np.zeros((90, 30), dtype=np.int32),
    "one expert that all want": random_costs(96, 12, high=1000) - 10**6 * np.eye(1, 12, 5, dtype=np.int32),
    "the same order for all": (np.arange(96)[:, None] + 1)
    * np.arange(12, dtype=np.int32)[None].astype(np.int32),
    "largest costs": np.where(random_costs(96, 24, seed=3) > 0, MAX_COST, -MAX_COST).astype(np.int32),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_costs_as_little_as_the_peers_optimum(name: str, peer: str):
    cost = np.ascontiguousarray(PROBLEMS[name], dtype=np.int32)
    labels, prices = assign(cost)
    assert_proved_optimal(cost, labels, prices)
    assert total(cost, labels) == PEERS[peer](cost)


@pytest.mark.parametrize(("f", "experts"), [(4, 2), (6, 2), (6, 3), (8, 2), (5, 5)])
def test_costs_as_little_as_the_best_of_all_balanced_labellings(f: int, experts: int):
    balanced = set(itertools.permutations(np.repeat(np.arange(experts), f // experts).tolist()))
    for seed in range(20):
        cost = random_costs(f, experts, seed, high=9)
        labels, _ = assign(cost)
        assert_balanced(labels, experts)
        assert total(cost, labels) == min(total(cost, np.array(other)) for other in balanced)


@pytest.mark.parametrize(("f", "experts"), [(4096, 64), (2048, 512)])
def test_large_answers_prove_themselves_optimal(f: int, experts: int):
    cost = random_costs(f, experts)
    cost += random_costs(1, experts, seed=1)  # some experts are wanted more than others
    assert_proved_optimal(cost, *assign(cost))


def test_guesses_change_neither_the_cost_nor_the_proof():
    cost = random_costs(240, 24)
    labels, prices = assign(cost)
    near = cost + random_costs(240, 24, seed=1, high=1 << 12)
    worst = np.full(24, MAX_COST, dtype=np.int32) * (np.arange(24, dtype=np.int32) % 3)
    for guesses in ((labels, prices), (None, prices), (labels, None), (np.zeros_like(labels), worst)):
        again = assign(near, *guesses)
        assert_proved_optimal(near, *again)
        assert total(near, again[0]) == total(near, assign(near)[0])


def test_the_own_answer_as_guess_is_kept():
    cost = random_costs(120, 24, high=2)
    labels, prices = assign(cost)
    again = assign(cost, labels, prices)
    assert (again[0] == labels).all()
    assert (again[1] == prices).all()


def test_guesses_are_left_as_they_were():
    cost = random_costs(60, 6)
    labels, prices = np.zeros(60, dtype=np.int64), np.arange(6, dtype=np.int32)
    assign(cost, labels, prices)
    assert not labels.any()
    assert (prices == np.arange(6)).all()


def test_other_threads_run_while_it_solves():
    solving = threading.Thread(target=assign, args=(random_costs(4096, 1024, high=3),))
    solving.start()
    turns = 0
    while solving.is_alive():
        turns += 1
    assert turns > 1000  # holding the GIL it would let this thread run once or twice


class Interrupted(Exception):
    pass


def test_a_signal_ends_it():
    def interrupt(*_: object) -> None:
        raise Interrupted

    def interrupted() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assign(cost)

    # Every row wants the same expert, so nearly all have to search: seconds of work.
    cost = np.outer(np.arange(8192, dtype=np.int32), np.arange(2048, dtype=np.int32))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupted):
            interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            "cost must be a C-contiguous, aligned numpy array of int32 with 2 axes, got list",
            ([[0]],),
        ),
        (
            ValueError,
            r"cost must be .* aligned .*got shape \(4, 2\)",
            (np.frombuffer(bytearray(33), np.int32, offset=1).reshape(4, 2),),
        ),
        (TypeError, "cost must be .* int32 with 2 axes, got float32", (np.zeros((4, 2), np.float32),)),
        (ValueError, r"cost must be .* 2 axes, got shape \(4,\)", (np.zeros(4, np.int32),)),
        (ValueError, r"cost must be C?.*got shape \(4, 2\) with strides", (np.zeros((2, 4), np.int32).T,)),
        (
            ValueError,
            r"cost must be \[f, E\] with E >= 1 a divisor of f >= 1, got \(5, 2\)",
            (np.zeros((5, 2), np.int32),),
        ),
        (ValueError, r"divisor of f >= 1, got \(0, 0\)", (np.zeros((0, 0), np.int32),)),
        (ValueError, r"divisor of f >= 1, got \(2, 4\)", (np.zeros((2, 4), np.int32),)),
        (ValueError, "cost must lie in .*: scale the costs down", (np.full((2, 1), MAX_COST + 1, np.int32),)),
        (
            TypeError,
            "labels must be .* int64 with 1 axis, got int32",
            (np.zeros((4, 2), np.int32), np.zeros(4, np.int32)),
        ),
        (
            ValueError,
            "labels must have 4 entries, got 3",
            (np.zeros((4, 2), np.int32), np.zeros(3, np.int64)),
        ),
        (
            ValueError,
            r"labels must lie in \[-1, 1\], got 2 to 2",
            (np.zeros((4, 2), np.int32), np.full(4, 2)),
        ),
        (TypeError, "prices must be .* int32", (np.zeros((4, 2), np.int32), None, np.zeros(2))),
        (ValueError, "prices must have 2 entries", (np.zeros((4, 2), np.int32), None, np.zeros(1, np.int32))),
        (
            ValueError,
            "prices must lie .* earlier call",
            (np.zeros((4, 2), np.int32), None, np.full(2, -1, np.int32)),
        ),
    ],
)
def test_assign_says_what_is_wrong(error: type[Exception], message: str, arguments: tuple):
    with pytest.raises(error, match=message):
        assign(*arguments)


def rows(f: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(f, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("f", "experts"), [(1, 1), (12, 1), (12, 12), (12, 6), (96, 4), (1056, 33)])
def test_every_expert_gets_equally_many_neurons(f: int, experts: int):
    assert_balanced(partition(rows(f, 16), experts).numpy(), experts)


def test_finds_groups_that_are_there():
    truth = torch.arange(16).repeat(24)
    weights = rows(16, 32)[truth] + 0.1 * rows(len(truth), 32, seed=1)
    assert torch.equal(partition(weights, 16), truth)  # experts are numbered by their first neuron


def plain_kmeans(weights: Tensor, experts: int, seed: int) -> float:
    """The inertia of balanced k-means as textbooks have it: random rows, exact assignment, means, repeat."""
    unit = torch.nn.functional.normalize(weights.double(), dim=1)
    centres = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:experts]]
    for _ in range(30):
        labels = torch.from_numpy(assign((torch.cdist(unit, centres).square() * 2**20).int().numpy())[0])
        centres = torch.stack([unit[labels == expert].mean(0) for expert in range(experts)])
    return inertia(weights, labels)


@pytest.mark.parametrize("experts", [12, 60])
def test_ends_clearly_below_plain_kmeans(experts: int):
    weights = rows(240, 12)
    plain = sum(plain_kmeans(weights, experts, seed) for seed in range(4))
    assert sum(inertia(weights, partition(weights, experts, seed=seed)) for seed in range(4)) < 0.98 * plain


def test_the_same_seed_gives_the_same_labels_and_another_seed_others():
    weights = rows(384, 24)
    assert torch.equal(partition(weights, 12, seed=5), partition(weights, 12, seed=5))
    assert not torch.equal(partition(weights, 12, seed=5), partition(weights, 12, seed=6))


def test_neither_threads_nor_the_global_generator_matter():
    weights, threads = rows(512, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        one, state = partition(weights, 32), torch.get_rng_state()
        torch.set_num_threads(4)
        torch.manual_seed(2)
        assert torch.equal(partition(weights, 32), one)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_the_scale_of_a_neuron_does_not_matter():
    weights = rows(384, 24)
    labels = partition(weights, 24)
    powers = torch.randint(-60, 60, (384, 1), generator=torch.Generator().manual_seed(1))
    assert torch.equal(partition(torch.ldexp(weights, powers), 24), labels)
    assert torch.equal(partition(weights * (0.01 + rows(384, 1, seed=2).abs()), 24), labels)


def test_scales_at_the_ends_of_the_range_do_not_overflow():
    weights = rows(96, 8).double()
    labels = partition(weights, 8)
    assert torch.equal(partition(weights * 2.0**1000, 8), labels)
    assert torch.equal(partition(weights * 2.0**-1000, 8), labels)


def test_the_order_of_the_neurons_does_not_matter():
    weights = rows(384, 24)
    labels = partition(weights, 24)
    order = torch.randperm(384, generator=torch.Generator().manual_seed(3))
    together = labels[order].unsqueeze(0) == labels[order].unsqueeze(1)
    found = partition(weights[order], 24)
    assert torch.equal(found.unsqueeze(0) == found.unsqueeze(1), together)


def test_experts_are_numbered_by_their_first_neuron():
    labels = partition(rows(96, 8), 8)
    firsts = [int((labels == expert).nonzero()[0]) for expert in range(8)]
    assert firsts == sorted(firsts)


def test_restarts_and_steps_never_raise_the_inertia():
    weights = rows(384, 24)
    once, tenth = partition(weights, 24), partition(weights, 24, restarts=10)
    assert (
        inertia(weights, tenth)
        < inertia(weights, once)
        < inertia(weights, partition(weights, 24, max_iter=1))
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_takes_every_floating_dtype_and_parameters_and_leaves_them_alone(dtype: torch.dtype):
    weights = torch.nn.Parameter(rows(96, 8).to(dtype))
    before = weights.detach().clone()
    labels = partition(weights, 8)
    assert torch.equal(weights, before)
    assert torch.equal(labels, partition(before.double(), 8))
    assert labels.dtype == torch.int64


def test_identical_rows_fill_whole_experts():
    weights = rows(96, 8)
    weights[::3] = 0  # 32 of them: 5 experts of 6, and 2 over
    weights[1:30:3] = 2 * weights[1]  # 10 of them along one line: 1 expert, and 4 over
    labels = partition(weights, 16)
    assert_balanced(labels.numpy(), 16)
    zeros = torch.bincount(labels[::3], minlength=16)
    assert (zeros == 6).sum() == 5
    assert (torch.bincount(labels[1:30:3], minlength=16) == 6).sum() == 1


def test_rows_that_are_all_the_same_are_shared_out():
    assert partition(torch.zeros(6, 8), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert_balanced(partition(torch.ones(10, 8), 2).numpy(), 2)


def test_inertia_is_the_sum_of_squared_distances_to_the_means():
    weights, labels = 3 * rows(60, 5), torch.arange(60) % 4
    unit = weights / weights.norm(dim=1, keepdim=True)
    direct = sum(((unit[labels == e] - unit[labels == e].mean(0)) ** 2).sum() for e in range(4))
    assert inertia(weights, labels) == pytest.approx(float(direct), rel=1e-5)  # float32 sums of 60 rows


def test_shows_its_progress_only_when_asked(capfd: pytest.CaptureFixture[str]):
    partition(rows(96, 8), 8)
    assert capfd.readouterr() == ("", "")
    partition(rows(96, 8), 8, progress=True)
    assert "partition: 100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"weights must be \[f, d\], one neuron a row, got \[4\]", {"weights": torch.zeros(4)}),
        (ValueError, r"one neuron a row, got \[0, 4\]", {"weights": torch.zeros(0, 4)}),
        (
            TypeError,
            "weights must be floating-point, got torch.int64",
            {"weights": torch.ones(4, 4, dtype=torch.int64)},
        ),
        (
            ValueError,
            "finite, got NaN or inf in 2 rows, first 1",
            {"weights": torch.tensor([1, torch.nan, -torch.inf])[:, None]},
        ),
        (ValueError, r"12 neurons do not split into 5 .* do: 4 \(of 3\) and 6 \(of 2\)", {"experts": 5}),
        (ValueError, r"into 13 equal experts; nearest that do: 12 \(of 1\)$", {"experts": 13}),
        (ValueError, "experts must be at least 1, got 0", {"experts": 0}),
        (TypeError, "experts must be an int, got 4.0", {"experts": 4.0}),
        (ValueError, "restarts must be at least 1, got 0", {"restarts": 0}),
        (ValueError, "max_iter must be at least 1, got -1", {"max_iter": -1}),
    ],
)
def test_partition_says_what_is_wrong(error: type[Exception], message: str, arguments: dict):
    with pytest.raises(error, match=message):
        partition(**{"weights": rows(12, 4), "experts": 4, **arguments})


def test_numbers_may_be_numpy_s():
    weights = rows(12, 4)
    assert torch.equal(partition(weights, np.int64(4)), partition(weights, 4))


def test_slots_are_sorted_by_expert_then_by_neuron():
    assert slots(torch.tensor([1, 0, 2, 1, 0, 2]), 3).tolist() == [1, 4, 0, 3, 2, 5]


@pytest.mark.parametrize(
    ("message", "labels"),
    [
        (r"labels must be int64 \[f\], got torch.float32 \[4\]", torch.zeros(4)),
        (r"labels must be int64 \[f\], got torch.int64 \[2, 2\]", torch.zeros(2, 2, dtype=torch.int64)),
        ("numbers of 2 experts, counted from 0, got 0 to 2", torch.tensor([0, 1, 2, 1])),
        ("numbers of 2 experts, counted from 0, got none", torch.zeros(0, dtype=torch.int64)),
        ("every expert must have equally many neurons, got 1 to 3", torch.tensor([0, 1, 1, 1])),
    ],
)
def test_slots_says_what_is_wrong(message: str, labels: Tensor):
    with pytest.raises(ValueError, match=message):
        slots(labels, 2)


def test_a_missing_solver_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "sadmoe.partition")
    monkeypatch.setitem(sys.modules, "sadmoe._partition", None)
    with pytest.raises(ImportError, match=r"compiled partition solver does not load: .*pip install \."):
        __import__("sadmoe.partition")
