"""From a checkpoint to a model page on the Hub; `jina-vlm upload` is the command.

origin       where the weights come from, and under what license
mlx          a copy that MLX quantized becomes the released layout again
assemble     a checkpoint and this repository's code become a folder
card         the folder's README.md, from `model_card.md.jinja`
check        the folder holds what it should, and answers in a fresh process
answer_once  what that process runs
push         the folder becomes one commit, compared with the local files afterwards

Of adapters for retrieval:

retrieval       a retrieval folder becomes a page whose base is another
retrieval_card  its README.md, from `retrieval_card.md.jinja`
embedding       it embeds in a fresh process, by each library alike
embed_once      what that process runs
merged          it and its base become one checkpoint, by `jina-vlm merge`
"""


class PublishingError(Exception):
    """What was given, what was expected and what to do, for people to read."""
