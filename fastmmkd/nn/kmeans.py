"""k-means with k-means++ (Arthur and Vassilvitskii 2007), a pure function of the numbers that it is given to pick by.

Shape legend: G groups, N rows, K centroids, d features.
"""

from __future__ import annotations

import torch


def kmeans(x: torch.Tensor, counts: torch.Tensor, picks: torch.Tensor, iterations: int) -> torch.Tensor:
    """Centroids of the rows that count.

    Args:
        x: `[G, N, d]`.
        counts: `[G, N]` bool, at least one of each group.
        picks: `[G, K]`, uniform in [0, 1): what the first centroids are picked by.
        iterations: of Lloyd's.

    Returns:
        `[G, K, d]`. A centroid that no row is nearest to stays where it is; so some are equal where there are fewer
        rows than centroids.
    """
    weight = counts.to(x.dtype)
    nearest = weight  # what the next one is picked by: at first all rows alike, then squared distances
    chosen: list[torch.Tensor] = []
    for pick in picks.to(x.dtype).unbind(1):
        total = nearest.sum(1, keepdim=True)
        odds = torch.where(total > 0, nearest, weight).cumsum(1)
        row = torch.searchsorted(odds, pick.unsqueeze(1) * odds[:, -1:], right=True).clamp_max(x.shape[1] - 1)
        chosen.append(x.gather(1, row.unsqueeze(-1).expand(-1, -1, x.shape[2])))
        distance = (x - chosen[-1]).square().sum(-1) * weight
        nearest = distance if len(chosen) == 1 else torch.minimum(nearest, distance)
    centroids = torch.cat(chosen, dim=1)
    for _ in range(iterations):
        own = torch.cdist(x, centroids).argmin(-1)
        member = torch.nn.functional.one_hot(own, centroids.shape[1]).to(x.dtype) * weight.unsqueeze(-1)  # [G, N, K]
        number = member.sum(1).unsqueeze(-1)
        centroids = torch.where(number > 0, member.mT @ x / number.clamp_min(1), centroids)
    return centroids
