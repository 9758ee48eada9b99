"""The losses of jina-embeddings-v4's paper (arXiv 2506.18902, section 5), with relevance that is known."""

import torch
from torch.nn import functional as F

from .scores import cut


def info_nce(scores: torch.Tensor, own: torch.Tensor, relevant: torch.Tensor, temperature: float) -> torch.Tensor:
    """Each query's own document against all that are not relevant.

    Args:
        scores: [queries, documents].
        own: [queries] int64, the number of each query's document.
        relevant: [queries, documents], bool: what is relevant beside its own is left out.
    """
    others = relevant.scatter(1, own[:, None], False)
    return F.cross_entropy((scores / temperature).masked_fill(others, -torch.inf), own)


def matryoshka(
    queries: torch.Tensor,
    documents: torch.Tensor,
    own: torch.Tensor,
    relevant: torch.Tensor,
    dims: list[int],
    temperature: float,
) -> torch.Tensor:
    """[`info_nce`] of dense vectors cut to each of `dims`, in the mean (arXiv 2205.13147)."""
    losses = [info_nce(cut(queries, dim) @ cut(documents, dim).T, own, relevant, temperature) for dim in dims]
    return torch.stack(losses).mean()


def agreement(dense: torch.Tensor, late: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler's distance of dense scores, as a distribution over documents, from late scores, which teach."""
    student, teacher = (F.log_softmax(scores / temperature, dim=-1) for scores in (dense, late.detach()))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def cosent(scores: torch.Tensor, truth: torch.Tensor, scale: float = 20.0) -> torch.Tensor:
    """Pairs that are more alike should have higher scores (CoSENT).

    Args:
        scores: [pairs], cosines.
        truth: [pairs], how alike they are.
    """
    differences = scale * (scores[None] - scores[:, None])  # of the less alike above the more alike
    wrong = differences[truth[:, None] > truth[None]]
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), dim=0)
