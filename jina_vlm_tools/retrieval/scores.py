"""Scores of queries and documents: by one vector each (dense), or by one for each token (late interaction)."""

import torch
from torch.nn import functional as F


CHUNK = 2**22  # numbers of documents, or scores, that are made at once: 16 MB in float32, near what caches hold


def pool(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens.

    Args:
        states: [batch, length, width].
        attention_mask: [batch, length].

    Returns:
        [batch, width] float32, not normalized.
    """
    mask = attention_mask[..., None].to(torch.float32)
    return (states.float() * mask).sum(1) / mask.sum(1)


def cut(dense: torch.Tensor, dims: int | None = None) -> torch.Tensor:
    """The first `dims` of each vector, of length 1."""
    return F.normalize(dense[..., :dims].float(), dim=-1)


def late_scores(
    queries: torch.Tensor,
    query_mask: torch.Tensor,
    documents: torch.Tensor,
    document_mask: torch.Tensor,
) -> torch.Tensor:
    """Late interaction (ColBERT, arXiv 2004.12832): for each of a query's tokens its best match among a document's,
    summed, and divided by the number of the query's tokens.

    Args:
        queries: [queries, tokens, width], of length 1.
        documents: [documents, tokens, width], of length 1.

    Returns:
        [queries, documents], from -1 to 1.
    """
    similar = torch.einsum("qiw,djw->qdij", queries, documents)
    similar = similar.masked_fill(~document_mask.bool()[None, :, None], -torch.inf)
    best = similar.amax(-1).masked_fill(~query_mask.bool()[:, None], 0)
    return best.sum(-1) / query_mask.sum(-1)[:, None]


def max_sim(query: torch.Tensor, documents: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[`late_scores`] of one query, [tokens, width], with documents one after the other, [all tokens, width]: document
    i is tokens `offsets[i]` to `offsets[i + 1]`. In pieces that fit into memory."""
    scores = torch.empty(len(offsets) - 1, dtype=torch.float32)
    query, places = query.float(), offsets.tolist()
    most, start = max(1, CHUNK // max(1, *query.shape)), 0
    while start < len(scores):
        end = start + 1
        while end < len(scores) and places[end + 1] - places[start] <= most:
            end += 1
        similar = documents[places[start] : places[end]].float() @ query.T
        lengths = offsets[start + 1 : end + 1] - offsets[start:end]
        scores[start:end] = torch.segment_reduce(similar, "max", lengths=lengths, axis=0).mean(1)
        start = end
    return scores
