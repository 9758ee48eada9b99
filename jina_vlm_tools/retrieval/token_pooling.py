"""Fewer multi-vectors for a document."""

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch.nn import functional as F


def pool_tokens(tokens: torch.Tensor, factor: int) -> torch.Tensor:
    """A `factor`th as many multi-vectors: the means of those that are most alike, by Ward's clustering
    (arXiv 2409.14683), of length 1.

    Args:
        tokens: [tokens, width], of length 1.

    Returns:
        [at most a `factor`th, rounded up, width].
    """
    number = -(-len(tokens) // factor)
    if number == len(tokens):
        return tokens
    labels = torch.from_numpy(fcluster(linkage(tokens.double().numpy(), "ward"), number, "maxclust") - 1).long()
    sums = torch.zeros(int(labels.max()) + 1, tokens.shape[1]).index_add_(0, labels, tokens)
    return F.normalize(sums, dim=-1)
