"""From a checkpoint to a model page on the Hub; `jina-vlm upload` is the command.

origin    where the weights come from, and under what license
assemble  a checkpoint and this repository's code become a folder
card      the folder's README.md, from `model_card.md.jinja`
check     the folder holds what it should, and answers in a fresh process
push      the folder becomes one commit, compared with the local files afterwards
"""


class PublishingError(Exception):
    """What was given, what was expected and what to do, for people to read."""
