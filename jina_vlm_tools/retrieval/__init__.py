"""Finding pages, by the same weights that answer: embeddings, scores, training, an index."""
