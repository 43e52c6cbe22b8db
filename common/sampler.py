"""Which transitions an update sees: the OTC sampler, equations (1) to (4).

Everything is batched over a leading group dimension G (agents times seeds), works on CPU and CUDA,
and never waits for the host, so that a whole update can be captured in one CUDA graph. Random
numbers come from torch's default generator of the device, or of a draw from its `generator`.

Source: Jiang and Lu, "Online Tuning for Offline Decentralized Multi-Agent Reinforcement Learning",
AAAI 2023; equation and line numbers are that paper's.
"""

import torch

# The largest block of pairwise distances held at once: 64 MiB, and for a moment ten times that for
# their dimensions; 4 on a CPU, where small ones are as fast and leave small holes in memory.
MAX_PAIRS, MAX_PAIRS_CPU = 2**24, 2**20


def match_by_value(
    candidates: torch.Tensor, references: torch.Tensor, exclude: torch.Tensor | None = None
) -> torch.Tensor:
    """Best match in absolute difference, equation (1) with d_q: sort the references once, search
    each candidate.

    Args:
        candidates: (G, B) values Q(s, a_i) of the candidate transitions.
        references: (G, D) values of the online transitions, D >= 1 (D >= 2 with `exclude`). Among
            references of equal value the choice depends on their order alone: references in random
            order make it uniform.
        exclude: (G, B) position of the reference that a candidate may not be matched with, -1 for
            none.

    Returns:
        (G, B) position of the best-matched reference in `references`.
    """
    num_references = references.shape[1]
    values, order = references.sort(dim=1)
    above = torch.searchsorted(values, candidates.contiguous())
    # The nearest value is one of the two neighbours; without one of them, one of the two on either
    # side.
    reach = 1 if exclude is None else 2
    window = above.unsqueeze(2) + torch.arange(-reach, reach, device=above.device)  # (G, B, 2 or 4)
    shape, window = window.shape, window.clamp(0, num_references - 1).flatten(1)
    positions = order.gather(1, window).view(shape)
    gap = (values.gather(1, window).view(shape) - candidates.unsqueeze(2)).abs()
    if exclude is not None:
        gap = gap.masked_fill(positions == exclude.unsqueeze(2), torch.inf)
    return positions.gather(2, gap.argmin(dim=2, keepdim=True)).squeeze(2)


def match_by_embedding(
    candidates: torch.Tensor, references: torch.Tensor, exclude: torch.Tensor | None = None
) -> torch.Tensor:
    """Best match in l1 distance between embeddings, equation (1) with d_e.

    Args:
        candidates: (G, B, d) embeddings of the candidate transitions.
        references: (G, D, d) embeddings of the online transitions.
        exclude: (G, B) position of the reference that a candidate may not be matched with, -1 for
            none.

    Returns:
        (G, B) position of the nearest reference in `references`; memory as of `nearest_distance`.
    """
    return _over_references(lambda pairs: pairs.argmin(dim=2), candidates, references, exclude)


def nearest_distance(
    candidates: torch.Tensor, references: torch.Tensor, exclude: torch.Tensor | None = None
) -> torch.Tensor:
    """l1 distance of each candidate to its best match, (G, B); arguments as of
    `match_by_embedding`.

    At most `MAX_PAIRS` pairwise distances, or those of one candidate per group, are in memory at a
    time.
    """
    return _over_references(lambda pairs: pairs.amin(dim=2), candidates, references, exclude)


def _over_references(reduce, candidates, references, exclude) -> torch.Tensor:
    """`reduce` of the distances to all references, (G, b, D) -> (G, b), for all candidates."""
    num_groups, num_references, dim = references.shape
    # Elsewhere than on a CPU pairs hold every dimension for a moment
    most = MAX_PAIRS_CPU if references.is_cpu else MAX_PAIRS * 10 // max(10, dim)
    chunk, found = max(1, most // (num_groups * num_references)), None
    for start in range(0, candidates.shape[1], chunk):
        pairs = l1_pairs(candidates[:, start : start + chunk], references)  # (G, b, D)
        if exclude is not None:
            forbidden = exclude[:, start : start + chunk].unsqueeze(2)
            pairs = pairs.masked_fill(
                forbidden == torch.arange(num_references, device=pairs.device), torch.inf
            )
        part = reduce(pairs)
        if found is None:  # one block: parts kept between what is freed would fragment memory
            found = part.new_empty(candidates.shape[:2])
        found[:, start : start + chunk] = part
    return found


def l1_pairs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """l1 distances of all pairs: (G, b, d), (G, D, d) -> (G, b, D)."""
    if x.is_cpu:
        return torch.cdist(x, y, p=1)
    # cdist's kernel gives a block of threads to every pair, whose few dimensions leave it idle
    differences = x.movedim(2, 0).unsqueeze(3) - y.movedim(2, 0).unsqueeze(2)  # (d, G, b, D)
    return torch.linalg.vector_norm(differences, 1, dim=0)


def find_self_matches(candidates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Where each candidate stands among the references as the very same transition, for `exclude`.

    Args:
        candidates, references: (G, B) and (G, D) indices into the replay.

    Returns:
        (G, B) position in `references`, -1 where the candidate is not among them.
    """
    indices, order = references.sort(dim=1)
    position = torch.searchsorted(indices, candidates.contiguous()).clamp(max=indices.shape[1] - 1)
    return torch.where(indices.gather(1, position) == candidates, order.gather(1, position), -1)


def relative_to_mean(
    values: torch.Tensor, left_out: torch.Tensor | None = None, floor: float = 1e-3
) -> torch.Tensor:
    """V / |E[V]| per group, as the next-state distance of d_q needs it: values (..., G, B) of that
    shape.

    The entries of the mask `left_out` (G, B) do not enter the mean. What divides is its magnitude,
    kept from falling under `floor`: values around zero do not blow up, and two means that zero
    lies between do not turn one of the two sides that d_q compares around.
    """
    weight = torch.ones_like(values) if left_out is None else (~left_out).to(values.dtype)
    mean = (weight * values).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)
    return values / mean.abs().clamp(min=floor)


def rank_at_random(distance: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Distances (G, B) >= 0 in which the entries of mask (G, B) are moved to random ranks among the
    others of their group, so that they are drawn as often as chance would; where there are no
    others, all to random ranks."""
    # Every entry gets a random key; one of the mask goes where as many others lie below it.
    order = torch.rand_like(distance).argsort(1)
    below = (~mask).gather(1, order).cumsum(1)
    below = torch.empty_like(below).scatter_(1, order, below)
    # The intervals between the others, and one above them
    top = 2 * distance.masked_fill(mask, 0).amax(1, keepdim=True)
    others = distance.masked_fill(mask, torch.inf).sort(1).values
    edges = torch.cat([torch.zeros_like(top), others.minimum(top), top], dim=1)
    low, high = edges.gather(1, below), edges.gather(1, below + 1)
    high = torch.where(mask.all(1, keepdim=True), torch.ones_like(high), high)
    moved = low + (high - low) * torch.rand_like(distance)
    return torch.where(mask, moved, distance)


def rank_probabilities(alpha: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Equation (3): probability of ranks 1 ... num_ranks, proportional to rank^-alpha; (G,) -> (G,
    num_ranks) float64."""
    return torch.softmax(rank_logits(alpha, num_ranks), dim=1)


def rank_logits(alpha: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """log(rank^-alpha) of ranks 1 ... num_ranks; (G,) -> (G, num_ranks) float64."""
    ranks = torch.arange(1, num_ranks + 1, dtype=torch.float64, device=alpha.device)
    return -alpha.double().unsqueeze(1) * ranks.log()


def draw_by_rank(
    distances: torch.Tensor,
    alpha: torch.Tensor,
    num_samples: int,
    replacement: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw candidates with probability proportional to rank^-alpha, equation (3); rank 1 is the
    smallest distance.

    Args:
        distances: (G, B) next-state distances; equal ones are ranked in random order, NaN ranks
            last.
        alpha: (G,) degree of the correction; 0 draws uniformly.
        num_samples: how many to draw, at most B without replacement.
        replacement: independent draws, or each candidate at most once (one after another, by Gumbel
            top-k).

    Returns:
        (G, num_samples) positions in `distances`.
    """
    num_groups, num_candidates = distances.shape
    device = distances.device
    # A NaN's sign counts in CUDA's sorts
    distances = distances.masked_fill(distances.isnan(), torch.nan)
    shuffle = torch.rand(distances.shape, generator=generator, device=device).argsort(dim=1)
    by_rank = shuffle.gather(1, distances.gather(1, shuffle).argsort(dim=1, stable=True))
    if replacement:
        # Ranks are a permutation, so their probabilities are known before they are: inverse CDF.
        uniform = torch.rand(
            num_groups, num_samples, generator=generator, device=device, dtype=torch.float64
        )
        ends = rank_probabilities(alpha, num_candidates).cumsum(dim=1)
        rank = torch.searchsorted(ends, uniform)
        rank = rank.clamp(max=num_candidates - 1)
    else:
        # Logits, not log-probabilities: at a large alpha all probabilities but the first underflow
        # to 0.
        logits = rank_logits(alpha, num_candidates)
        exponential = torch.empty_like(logits).exponential_(generator=generator)
        rank = (logits - exponential.log()).topk(num_samples, dim=1).indices
    return by_rank.gather(1, rank)


def adapt_alpha(
    alpha: torch.Tensor, distance: torch.Tensor, previous: torch.Tensor
) -> torch.Tensor:
    """Equation (4): alpha^k = alpha^{k-1} * D^k / D^{k-1}, all (G,); alpha stays where a distance
    is 0 or not finite."""
    adapted = alpha * (distance / previous)
    return torch.where(usable(distance) & usable(previous) & adapted.isfinite(), adapted, alpha)


def usable(distance: torch.Tensor) -> torch.Tensor:
    """Whether a mean transition distance can enter equation (4): finite and above zero."""
    return torch.isfinite(distance) & (distance > 0)


def unique_fraction(index: torch.Tensor) -> torch.Tensor:
    """Share of different transitions in a batch: (G, n) -> (G,)."""
    ordered = index.sort(dim=1).values
    return ((ordered.diff(dim=1) != 0).sum(dim=1) + 1) / index.shape[1]


def effective_sample_size(alpha: torch.Tensor, num_candidates: int) -> torch.Tensor:
    """1 / sum of squared rank probabilities: how many candidates the draw amounts to; (G,) ->
    (G,)."""
    return 1 / rank_probabilities(alpha, num_candidates).square().sum(dim=1)
