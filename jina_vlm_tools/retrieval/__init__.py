"""Finding pages, by the same weights that answer: embeddings, scores, training, an index. Imports nothing that takes
time: commands name these defaults in their help."""

KINDS = {"two-stage": "both", "late": "multi", "dense": "dense"}  # ways to search: what each needs of a query
CANDIDATES = 100  # pages that "two-stage" compares by their tokens
MAX_TILES = 4  # of a page, in a new index
