"""Sampler: brute force in numpy (float64), chi-square tests of what is drawn, edge cases, memory,
no host waits."""

import itertools
import warnings

import numpy as np
import pytest
import torch

from common import sampler
from common.sampler import (
    adapt_alpha,
    draw_by_rank,
    effective_sample_size,
    find_self_matches,
    match_by_embedding,
    match_by_value,
    nearest_distance,
    rank_probabilities,
    relative_to_mean,
    unique_fraction,
    usable,
)
from common.strategies import Priorities
from tests.helpers import Watch, array, assert_frequencies, no_host_waits

NAN, INF = float("nan"), float("inf")
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def to(array, device) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float32, device=device)


def rank_law(alpha: float, num_ranks: int) -> np.ndarray:
    """Equation (3) as written."""
    weights = np.arange(1, num_ranks + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()


# --- Best match ---


def brute_match(candidates, references, exclude=None) -> np.ndarray:
    """Smallest l1 distance of each candidate to the allowed references: (G, B)."""
    candidates, references = np.float64(candidates), np.float64(references)
    pairs = np.abs(candidates[:, :, None] - references[:, None]).sum(-1)
    if exclude is not None:
        g, b = np.nonzero(exclude >= 0)
        pairs[g, b, exclude[g, b]] = np.inf
    return pairs.min(axis=2)


def distance_to(candidates, references, index) -> np.ndarray:
    """l1 distance of each candidate to the reference it was given: (G, B)."""
    picked = np.take_along_axis(np.float64(references), index[:, :, None], axis=1)
    return np.abs(np.float64(candidates) - picked).sum(-1)


SIZES = [(1, 1, 1), (3, 1, 2), (2, 50, 1), (2, 40, 2), (4, 200, 37), (2, 64, 1000)]


@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["distinct", "some ties", "many ties"])
@pytest.mark.parametrize("size", SIZES)
def test_match_by_value_is_the_nearest(size, decimals, device, rng):
    G, B, D = size
    c, r = (rng.normal(size=(G, n, 1)).astype(np.float32) for n in (B, D))
    if decimals is not None:
        c, r = c.round(decimals), r.round(decimals)
    index = array(match_by_value(to(c[..., 0], device), to(r[..., 0], device)))
    assert index.shape == (G, B) and index.min() >= 0 and index.max() < D
    np.testing.assert_allclose(distance_to(c, r, index), brute_match(c, r), rtol=0, atol=1e-6)


@pytest.mark.parametrize("d", [1, 10])
@pytest.mark.parametrize("size", SIZES)
def test_nearest_distance_is_the_nearest(size, d, device, rng):
    G, B, D = size
    c, r = (rng.normal(size=(G, n, d)).astype(np.float32) for n in (B, D))
    distance = array(nearest_distance(to(c, device), to(r, device)))
    assert distance.shape == (G, B)
    np.testing.assert_allclose(distance, brute_match(c, r), rtol=1e-5, atol=1e-6)
    index = array(match_by_embedding(to(c, device), to(r, device)))
    assert index.shape == (G, B)
    np.testing.assert_allclose(distance_to(c, r, index), brute_match(c, r), rtol=1e-5, atol=1e-6)


def test_both_distances_agree_in_one_dimension(device, rng):
    c, r = to(rng.normal(size=(3, 80)), device), to(rng.normal(size=(3, 60)), device)
    gap = (c - r.gather(1, match_by_value(c, r))).abs()
    assert torch.equal(nearest_distance(c[..., None], r[..., None]), gap)


@pytest.mark.parametrize("by", ["value", "embedding"])
@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["distinct", "some ties", "many ties"])
@pytest.mark.parametrize("size", [(3, 2, 2), (4, 60, 3), (4, 200, 50)])
def test_excluded_references_are_not_matched(size, decimals, by, device, rng):
    G, B, D = size
    c, r = (rng.normal(size=(G, n, 1)).astype(np.float32) for n in (B, D))
    if decimals is not None:
        c, r = c.round(decimals), r.round(decimals)
    exclude = rng.integers(-1, D, (G, B))
    selves = (exclude >= 0) & (rng.random((G, B)) < 0.7)
    c[selves] = np.take_along_axis(r[..., 0], exclude.clip(0), 1)[selves][:, None]
    forbidden = torch.tensor(exclude, device=device)
    expected = brute_match(c, r, exclude)
    if by == "embedding":
        distance = array(nearest_distance(to(c, device), to(r, device), forbidden))
        np.testing.assert_allclose(distance, expected, rtol=0, atol=1e-6)
        index = array(match_by_embedding(to(c, device), to(r, device), forbidden))
    else:
        index = array(match_by_value(to(c[..., 0], device), to(r[..., 0], device), forbidden))
    assert (index != exclude).all() and index.min() >= 0 and index.max() < D
    np.testing.assert_allclose(distance_to(c, r, index), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("excluding", [False, True])
def test_ties_are_uniform_when_references_are_in_random_order(excluding, device, rng):
    values = np.array([1.0, 1, 1, 5, 5, 9])
    G = 6000
    identity = np.argsort(rng.random((G, 6)), axis=1)  # whose value each reference is
    references = values[identity]
    at, winners = np.array([1, 0, 2, 4.9, 5, 6]), [[0, 1, 2]] * 3 + [[3, 4]] * 3
    candidates = np.tile(at, (G, 1))
    exclude = None
    if excluding:  # one of the tied ones
        gone = np.array([0, 1, 2, 3, 4, 3])
        exclude = torch.tensor(np.argsort(identity, axis=1)[:, gone], device=device)
        winners = [[i for i in w if i != g] for w, g in zip(winners, gone, strict=True)]
    c, r = to(candidates, device), to(references, device)
    index = match_by_value(c, r, exclude)
    chosen = np.take_along_axis(identity, array(index), axis=1)
    for b, tied in enumerate(winners):
        if len(tied) == 1:
            assert (chosen[:, b] == tied[0]).all()
        else:
            assert_frequencies(chosen[:, b], np.isin(np.arange(6), tied))


def test_infinite_values_are_matched_with_their_like(device):
    r = to([[3, INF, -INF, -2]], device)
    c = to([[INF, -INF, 1e38, -1e38, 2.9, 0]], device)
    assert match_by_value(c, r).tolist() == [[1, 2, 0, 3, 0, 3]]


@pytest.mark.parametrize("excluding", [False, True])
def test_nan_gives_valid_positions_and_stays_in_its_group(excluding, device, rng):
    c, r = to(rng.normal(size=(4, 30)), device), to(rng.normal(size=(4, 20)), device)
    exclude = torch.randint(-1, 20, (4, 30), device=device) if excluding else None
    clean = match_by_value(c, r, exclude)
    clean_distance = nearest_distance(c[..., None], r[..., None], exclude)
    c[0, ::2], r[1, ::3], r[2] = NAN, NAN, NAN
    index = match_by_value(c, r, exclude)
    assert index.min() >= 0 and index.max() < 20
    distance = nearest_distance(c[..., None], r[..., None], exclude)
    for found, expected in ((index, clean), (distance, clean_distance)):
        assert torch.equal(found[3], expected[3])
        assert torch.equal(found[0, 1::2], expected[0, 1::2])


def test_columns_of_a_larger_tensor_match_without_warnings(device):
    pairs = torch.randn(2, 30, 2, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = match_by_value(pairs[..., 0], pairs[..., 1])
    expected = match_by_value(pairs[..., 0].contiguous(), pairs[..., 1].contiguous())
    assert torch.equal(index, expected)


@pytest.mark.parametrize("limit", [1, 7, 100, 500])
@pytest.mark.parametrize("excluding", [False, True])
def test_chunks_do_not_change_the_match(limit, excluding, device, rng, monkeypatch):
    c, r = to(rng.normal(size=(3, 41, 4)), device), to(rng.normal(size=(3, 11, 4)), device)
    exclude = torch.randint(-1, 11, (3, 41), device=device) if excluding else None
    whole = nearest_distance(c, r, exclude)
    for name in ("MAX_PAIRS", "MAX_PAIRS_CPU"):
        monkeypatch.setattr(sampler, name, limit)
    parts = nearest_distance(c, r, exclude)
    assert torch.equal(whole, parts)


def test_memory_of_a_large_match_is_bounded(device):
    candidates, references = torch.randn(1, 1_000_000, device=device), torch.randn(1, 10_000)
    with Watch() as watch:
        index = match_by_value(candidates, references.to(device))
    assert watch.largest <= 4 * 1_000_000
    some = slice(0, 200)
    expected = brute_match(array(candidates)[:, some, None], array(references)[..., None])
    found = array(references)[0, array(index)[0, some]]
    np.testing.assert_allclose(np.abs(array(candidates)[0, some] - found), expected[0], atol=1e-6)

    references = torch.randn(3, 10_000, 2, device=device)
    with Watch() as watch:
        nearest_distance(torch.randn(3, 1500, 2, device=device), references)
    # Elsewhere than on a CPU both dimensions of every pair
    limit = sampler.MAX_PAIRS_CPU if references.is_cpu else 2 * sampler.MAX_PAIRS
    assert limit // 2 < watch.largest <= limit


def test_find_self_matches(device, rng):
    references = np.argsort(rng.random((3, 50)), axis=1)[:, :20]
    candidates = rng.integers(0, 55, (3, 200))
    found = array(
        find_self_matches(
            torch.tensor(candidates, device=device), torch.tensor(references, device=device)
        )
    )
    for g, b in itertools.product(range(3), range(200)):
        at = np.flatnonzero(references[g] == candidates[g, b])
        assert found[g, b] == (at[0] if len(at) else -1)


def test_self_matches_have_distance_zero_until_they_are_excluded(device, rng):
    data = to(rng.normal(size=(2, 100, 3)), device)
    candidates = torch.randint(0, 100, (2, 64), device=device)  # B, with D inside it
    references = torch.rand(2, 100, device=device).argsort(1)[:, :50]
    b, d = (data.gather(1, i[..., None].expand(-1, -1, 3)) for i in (candidates, references))
    selves = find_self_matches(candidates, references)
    among = selves >= 0
    assert 0 < among.sum() < among.numel()
    for exclude in (None, selves):
        index = match_by_value(b[..., 0], d[..., 0], exclude)
        by_value = (b[..., 0] - d[..., 0].gather(1, index)).abs()
        for distance in (by_value, nearest_distance(b, d, exclude)):
            assert ((distance == 0) == (among if exclude is None else False)).all()


# --- Draw by rank ---


def test_rank_probabilities(device):
    alpha = to([0, 0.5, 1, 2, 3.7], device)
    probabilities = array(rank_probabilities(alpha, 512))
    for row, a in zip(probabilities, array(alpha), strict=True):
        np.testing.assert_allclose(row, rank_law(np.float64(a), 512), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
def test_draws_follow_the_rank(alpha, device, rng):
    """Every group has its own alpha and its own order of the same distances."""
    alphas = np.array([alpha, 1.5, 0, alpha])
    ranks = np.argsort(rng.random((4, 40)), axis=1)
    distances = (ranks + 1.0) ** 3
    index = array(draw_by_rank(to(distances, device), to(alphas, device), 20_000))
    assert index.shape == (4, 20_000)
    for g in range(4):
        assert_frequencies(ranks[g, index[g]], rank_law(alphas[g], 40))


def test_draws_with_replacement_are_independent(device):
    index = array(draw_by_rank(to([[0, 1, 2, 3]], device), to([1], device), 40_000))[0]
    law = rank_law(1, 4)
    assert_frequencies(index[::2] * 4 + index[1::2], np.outer(law, law).ravel())


@pytest.mark.parametrize("replacement", [True, False])
def test_ties_are_ranked_in_random_order(replacement, device):
    distances = to([[7, 2, 7, 2, 7]], device).expand(8000, -1)
    index = draw_by_rank(distances, to([3], device).expand(8000), 1, replacement)
    law = rank_law(3, 5)
    near, far = law[:2].mean(), law[2:].mean()
    assert_frequencies(array(index), [far, near, far, near, far])


def test_all_nan_draws_uniformly(device):
    distances = torch.full((4000, 6), NAN, device=device)
    index = draw_by_rank(distances, to([2], device).expand(4000), 1)
    assert_frequencies(array(index), np.ones(6))


def test_nan_ranks_last(device):
    distances = to([[NAN, 2, -NAN, 1, INF]], device).expand(2000, -1)
    huge = torch.full((2000,), 1e4, device=device)
    assert (draw_by_rank(distances, huge, 50) == 3).all()
    order = draw_by_rank(distances, huge, 5, replacement=False)
    assert (order[:, :3] == torch.tensor([3, 1, 4], device=device)).all()
    assert_frequencies(array(order[:, 3]), [1, 0, 1, 0, 0])
    index = draw_by_rank(distances[:1], to([1], device), 20_000)
    law = rank_law(1, 5)
    last = law[3:].mean()
    # One call ranks ties once, hence the sum of the two
    folded = array(torch.where(index == 0, 2, index))
    assert_frequencies(folded, [0, law[1], 2 * last, law[0], law[2]])


def test_without_replacement_every_candidate_comes_at_most_once(device):
    distances, alpha = torch.rand(3, 60, device=device), to([0, 1, 30], device)
    for n in (1, 25, 60):
        index = draw_by_rank(distances, alpha, n, replacement=False)
        assert index.shape == (3, n) and index.min() >= 0 and index.max() < 60
        assert (unique_fraction(index) == 1).all()


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
def test_without_replacement_draws_one_after_another(alpha, device):
    distances = to([[4, 0, 2, 1, 3]], device).expand(10_000, -1)
    alphas = torch.full((10_000,), float(alpha), device=device)
    index = array(draw_by_rank(distances, alphas, 3, replacement=False))
    p = rank_law(alpha, 5)[[4, 0, 2, 1, 3]]
    assert_frequencies(index[:, 0], p)
    law = np.zeros((5, 5, 5))
    for i, j, k in itertools.permutations(range(5), 3):
        law[i, j, k] = p[i] * p[j] / (1 - p[i]) * p[k] / (1 - p[i] - p[j])
    assert_frequencies(index @ [25, 5, 1], law.ravel())


@pytest.mark.parametrize(
    "alpha, first, unique, size",
    [  # 128 of 512: the table of how uneven a draw becomes
        (0, 0.002, 113, 512),
        (0.5, 0.023, 106, 282),
        (1, 0.147, 70, 28),
        (1.5, 0.396, 32, 5.3),
        (2, 0.609, 15, 2.5),
        (3, 0.832, 6, 1.4),
    ],
)
def test_unique_share_and_effective_sample_size(alpha, first, unique, size, device):
    alphas = torch.full((300,), float(alpha), device=device)
    assert rank_probabilities(alphas, 512)[0, 0].item() == pytest.approx(first, abs=6e-4)
    assert effective_sample_size(alphas, 512)[0].item() == pytest.approx(size, rel=0.02, abs=0.05)
    index = draw_by_rank(torch.rand(300, 512, device=device), alphas, 128)
    measured = 128 * unique_fraction(index).double().mean().item()
    exact = (1 - (1 - rank_law(alpha, 512)) ** 128).sum()
    assert measured == pytest.approx(exact, abs=1.5)
    assert measured == pytest.approx(unique, abs=2)


def test_diagnostics_against_numpy(device, rng):
    index = rng.integers(0, 20, (5, 33))
    expected = [len(np.unique(row)) / 33 for row in index]
    np.testing.assert_allclose(array(unique_fraction(torch.tensor(index))), expected, rtol=1e-6)
    assert unique_fraction(torch.zeros(2, 1, dtype=torch.long)).tolist() == [1, 1]
    alphas = [0, 0.3, 4]
    expected = [1 / (rank_law(a, 77) ** 2).sum() for a in alphas]
    np.testing.assert_allclose(
        array(effective_sample_size(to(alphas, device), 77)), expected, rtol=1e-6
    )


@pytest.mark.parametrize("alpha", [35, 1e4, 3e38])
def test_extreme_alpha_draws_the_nearest(alpha, device):
    alphas = torch.full((2,), float(alpha), device=device)
    probabilities = rank_probabilities(alphas, 512)
    assert probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))
    assert effective_sample_size(alphas, 512).tolist() == pytest.approx([1, 1])
    distances = torch.rand(2, 512, device=device)
    nearest = distances.argmin(1, keepdim=True)
    assert (draw_by_rank(distances, alphas, 128) == nearest).all()
    assert (draw_by_rank(distances, alphas, 1, replacement=False) == nearest).all()


def test_extreme_alpha_without_replacement_takes_the_nearest_in_order(device):
    distances = torch.rand(2, 512, device=device)
    index = draw_by_rank(distances, to([1e5, 1e6], device), 128, replacement=False)
    assert torch.equal(index, distances.argsort(1)[:, :128])


@pytest.mark.parametrize("replacement", [True, False])
def test_draw_of_one_candidate(replacement, device):
    distances, alpha = to([[NAN], [3]], device), to([1, 50], device)
    assert (draw_by_rank(distances, alpha, 1, replacement) == 0).all()


@pytest.mark.parametrize("replacement", [True, False])
def test_generator_decides_the_draw(replacement, device):
    distances, alpha = torch.zeros(3, 50, device=device), to([0, 1, 2], device)

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return draw_by_rank(distances, alpha, 20, replacement, generator)

    first = draw(1)
    torch.rand(10, device=device)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))


# --- Alpha and the scale of values ---


def test_alpha_telescopes_over_ten_deployments(device, rng):
    distances = np.exp(rng.normal(size=(10, 6)))
    alpha = first = to(rng.uniform(0.1, 2, 6), device)
    for k in range(1, 10):
        alpha = adapt_alpha(alpha, to(distances[k], device), to(distances[k - 1], device))
        expected = array(first) * distances[k] / distances[0]
        np.testing.assert_allclose(array(alpha), expected, rtol=1e-5)


def test_alpha_stays_where_a_distance_is_of_no_use(device):
    bad = [0, -1, NAN, INF, -INF]
    pairs = [(x, 2.0) for x in bad] + [(2.0, x) for x in bad] + [(x, x) for x in bad]
    pairs += [(1e30, 1e-30), (4.0, 2.0)]  # a ratio that overflows, and a good pair
    distance, previous = to(pairs, device).T
    alpha = torch.full_like(distance, 1.5)
    assert adapt_alpha(alpha, distance, previous).tolist() == [1.5] * (len(pairs) - 1) + [3.0]
    assert usable(to([*bad, 1e-6, 3], device)).tolist() == [False] * 5 + [True] * 2


def test_relative_to_mean(device, rng):
    values = rng.normal(size=(4, 50)) + np.array([[5], [-3], [0], [0]])
    values[2] += 4e-4 - values[2].mean()
    values[3] += -4e-4 - values[3].mean()
    result = array(relative_to_mean(to(values, device)))
    expected = values / np.array([[values[0].mean()], [-values[1].mean()], [1e-3], [1e-3]])
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    assert relative_to_mean(torch.zeros(2, 3, device=device)).eq(0).all()
    wide = array(relative_to_mean(to(values, device), floor=10.0))
    np.testing.assert_allclose(np.abs(wide), np.abs(values) / 10, rtol=1e-4, atol=1e-6)
    left_out = rng.random(values.shape) < 0.3
    left_out[1] = True  # nothing to take the mean of
    without = array(relative_to_mean(to(values, device), torch.tensor(left_out, device=device)))
    means = [values[0][~left_out[0]].mean(), 1e-3]
    np.testing.assert_allclose(without[:2], values[:2] / np.array(means)[:, None], rtol=1e-4)


# --- Priorities ---


def priorities_of(values, device) -> Priorities:
    """A Priorities with the given (G, size) values."""
    values = np.asarray(values, np.float32)
    priorities = Priorities(*values.shape, device)
    index = torch.arange(values.shape[1], device=device).expand(values.shape)
    priorities.update(index, to(values, device))
    return priorities


def kept(priorities: Priorities) -> np.ndarray:
    """Its (G, size) values, after a look at the sums and at the padding."""
    values = array(priorities.values).astype(np.float64)
    np.testing.assert_allclose(array(priorities.sums), values.sum(2), rtol=1e-12, atol=0)
    values = values.reshape(len(values), -1)
    assert not values[:, priorities.size :].any()
    return values[:, : priorities.size]


@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 2500])
def test_draws_are_in_proportion_to_the_priorities(size, device, rng):
    values = rng.lognormal(sigma=1.5, size=(2, size))
    values[:, 1::3] = 0
    priorities = priorities_of(values, device)
    num_samples = 3000
    index = array(priorities.draw(num_samples))
    assert index.shape == (2, num_samples) and index.min() >= 0 and index.max() < size
    law = kept(priorities)
    law /= law.sum(1, keepdims=True)
    for g in range(2):
        # Draws are one per slice of equal mass: no item can be off by more than its two end slices.
        counts = np.bincount(index[g], minlength=size)
        assert (np.abs(counts - num_samples * law[g]) < 2 + 1e-6).all()
        assert not counts[law[g] == 0].any()


def test_draw_frequencies_across_blocks(device, rng):
    values = rng.lognormal(size=(2, 2100))
    values[0, :1024] *= 1e-3
    values[1, 1024:2048] = 0
    priorities = priorities_of(values, device)
    index = np.concatenate([array(priorities.draw(128)) for _ in range(300)], axis=1)
    # The first of two draws tells positions inside a slice apart from the slices.
    singles = np.concatenate([array(priorities.draw(1)) for _ in range(4000)], axis=1)
    for g in range(2):
        assert_frequencies(index[g], values[g])
        assert_frequencies(singles[g] // 100, np.add.reduceat(values[g], np.arange(0, 2100, 100)))


def test_huge_range_of_priorities(device, rng):
    values = 10.0 ** rng.uniform(-3, 3, (1, 5000))
    values[0, :1024] = 1e-3
    priorities = priorities_of(values, device)
    num_samples = 10_000
    index = array(priorities.draw(num_samples))[0]
    expected = num_samples * values[0] / values.sum()
    assert (np.abs(np.bincount(index, minlength=5000) - expected) < 2 + 1e-3).all()
    only_small = values.copy()
    only_small[0, 1024:] = 0
    index = array(priorities_of(only_small, device).draw(2048))[0]
    assert (np.bincount(index, minlength=5000)[:1024] <= 4).all() and index.max() < 1024


@pytest.mark.parametrize(
    "size, first, filled",
    [(300, 0, 300), (3000, 5, 300), (1024, 0, 1024), (2048, 0, 1024), (4000, 1100, 1500)],
)
def test_rounding_at_the_ends_of_the_mass(size, first, filled, device, monkeypatch):
    """The largest and the smallest uniform number stay inside the items that have mass."""
    priorities = Priorities(2, size, device)
    priorities.fill(first, filled, 1e3)
    priorities.fill(filled - 1, filled, 1e-3)
    for number, end, item in ((1 - 2**-53, -1, filled - 1), (0.0, 0, first)):
        monkeypatch.setattr(
            torch,
            "rand",
            lambda *shape, generator=None, number=number, **kwargs: torch.full(
                shape, number, **kwargs
            ),
        )
        for n in (1, 7, 100, 128):
            index = priorities.draw(n)
            assert index.min() >= first and index.max() < filled
            assert (index[:, end] == item).all()


@pytest.mark.parametrize("priority", [0.0, NAN])
def test_indices_stay_in_range_without_mass(priority, device):
    priorities = Priorities(2, 1500, device)
    priorities.fill(0, 1500, priority)
    index = priorities.draw(50)
    assert index.min() >= 0 and index.max() < 1500


def test_fill_then_update_then_draw(device):
    priorities = Priorities(2, 2000, device)
    priorities.fill(0, 1500, 1.0)
    priorities.fill(1500, 1600, 15.0)
    expected = np.zeros((2, 2000))
    expected[:, :1500], expected[:, 1500:1600] = 1, 15
    np.testing.assert_array_equal(kept(priorities), expected)
    share = (array(priorities.draw(1000)) >= 1500).mean()
    assert share == pytest.approx(0.5, abs=0.01)

    priorities.fill(0, 1600, 0.0)
    index = torch.tensor([[3, 1030], [1999, 0]], device=device)
    priorities.update(index, to([[1, 3], [2, 2]], device))
    drawn = array(priorities.draw(400))
    assert np.bincount(drawn[0])[[3, 1030]].tolist() == pytest.approx([100, 300], abs=1)
    assert np.bincount(drawn[1])[[1999, 0]].tolist() == pytest.approx([200, 200], abs=1)
    priorities.update(index[:, :1], to([[0], [0]], device))
    assert (priorities.draw(50) == index[:, 1:]).all()


def test_sums_agree_with_values_after_many_updates(device, rng):
    size = 3333
    priorities = Priorities(3, size, device)
    priorities.fill(0, size, 1.0)
    expected = np.ones((3, size), np.float32)
    for _ in range(150):
        index = rng.integers(0, size, (3, 64))
        index[:, 40:] = index[:, :24]  # duplicates
        values = (10 ** rng.uniform(-3, 3, (3, 64))).astype(np.float32)
        priorities.update(torch.tensor(index, device=device), to(values, device))
        result = kept(priorities).astype(np.float32)
        for g, i in zip(*np.nonzero(result != expected), strict=True):
            assert result[g, i] in values[g, index[g] == i]
            expected[g, i] = result[g, i]
        assert (result == expected).all()
        for g in range(3):  # nothing drawn kept its old priority
            assert np.isin(result[g, index[g]], values[g]).all()


def test_priorities_state(device, rng):
    priorities = priorities_of(rng.random((2, 1100)), device)
    other = Priorities(2, 1100, device)
    other.load_state_dict(priorities.state_dict())
    np.testing.assert_array_equal(kept(other), kept(priorities))
    draws = [p.draw(64, torch.Generator(device).manual_seed(3)) for p in (priorities, other)]
    assert torch.equal(*draws)


# --- Groups and the host ---


def test_groups_do_not_see_each_other(device, rng):
    order = torch.tensor([2, 0, 3, 1], device=device)
    c, r = to(rng.normal(size=(4, 50, 3)), device), to(rng.normal(size=(4, 30, 3)), device)
    values, others = c[..., 0].contiguous(), r[..., 0].contiguous()
    alpha, previous = to(rng.random(4), device), to(rng.random(4), device)
    exclude = torch.randint(-1, 30, (4, 50), device=device)
    ids, some = (torch.randint(0, 90, (4, n), device=device) for n in (50, 30))
    for function, inputs in (
        (match_by_value, (values, others)),
        (match_by_value, (values, others, exclude)),
        (nearest_distance, (c, r, exclude)),
        (nearest_distance, (c, r)),
        (match_by_embedding, (c, r, exclude)),
        (find_self_matches, (ids, some.sort(1).values)),
        (relative_to_mean, (values,)),
        (adapt_alpha, (alpha, alpha.flip(0), previous)),
        (lambda a: rank_probabilities(a, 20), (alpha,)),
        (unique_fraction, (ids,)),
        # At a huge alpha chance has no say.
        (lambda x: draw_by_rank(x, torch.full_like(x[:, 0], 1e6), 9, False), (values,)),
    ):
        assert torch.equal(function(*inputs)[order], function(*(x[order] for x in inputs)))


def test_no_call_waits_for_the_host(device):
    c, r = torch.randn(2, 64, 3, device=device), torch.randn(2, 40, 3, device=device)
    ids, some = (torch.randint(0, 90, (2, n), device=device) for n in (64, 40))
    alpha = torch.ones(2, device=device)
    generator = torch.Generator(device).manual_seed(0)
    priorities = Priorities(2, 1500, device)

    def everything():
        exclude = find_self_matches(ids, some)
        match_by_value(c[..., 0], r[..., 0])
        match_by_value(c[..., 0], r[..., 0], exclude)
        nearest_distance(c, r)
        match_by_embedding(c, r, exclude)
        distance = nearest_distance(c, r, exclude)
        relative_to_mean(c[..., 0])
        for replacement in (True, False):
            draw_by_rank(distance, alpha, 16, replacement)
            index = draw_by_rank(distance, alpha, 16, replacement, generator)
        adapt_alpha(alpha, distance.mean(1), distance.mean(1))
        unique_fraction(index)
        effective_sample_size(alpha, 64)
        priorities.fill(0, 1500, 1.0)
        drawn = priorities.draw(32)
        priorities.update(drawn, torch.rand(2, 32, device=device))

    everything()  # kernels load
    with no_host_waits(device):
        everything()


def test_the_watch_sees_waits():
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())):
        with pytest.raises(AssertionError, match="waits for the host"), Watch():
            wait(torch.ones(3))


def test_what_is_left_unranked_is_drawn_as_chance_would():
    torch.manual_seed(0)
    distance, mask = torch.rand(3, 200), torch.rand(3, 200) < 0.2
    mask[1], mask[2] = True, False
    distance[0, mask[0]] = 0.0  # ranked, they would come first
    drawn, rounds = torch.zeros(3), 2000
    for _ in range(rounds):
        changed = sampler.rank_at_random(distance, mask)
        assert torch.equal(changed[~mask], distance[~mask])
        assert torch.equal(changed[2], distance[2])
        index = sampler.draw_by_rank(changed, torch.full((3,), 2.0), 50)
        drawn += mask.gather(1, index).float().mean(1) / rounds
    assert abs(drawn[0] - mask[0].float().mean()) < 0.03
    ranked = sampler.draw_by_rank(distance, torch.full((3,), 2.0), 50)
    assert mask[0][ranked[0]].float().mean() > 0.9

    # Where all are left out, whatever their distances: all are as likely
    distance, mask = torch.arange(8.0).expand(4000, -1), torch.ones(4000, 8, dtype=bool)
    index = sampler.draw_by_rank(
        sampler.rank_at_random(distance, mask), torch.full((4000,), 2.0), 8
    )
    assert (index.flatten().bincount(minlength=8) / 32_000 - 1 / 8).abs().max() < 0.015

    # Each rank, the first and the last too, is as likely as any other
    distance, mask = torch.rand(4000, 8), torch.arange(8).expand(4000, -1) < 3
    changed = sampler.rank_at_random(distance, mask)
    assert (changed.diff(dim=1) != 0).all()
    share = changed.argsort(1).argsort(1)[:, :3].flatten().bincount(minlength=8) / 12_000
    assert (share - 1 / 8).abs().max() < 0.015
