"""The command `jina-vlm`: a module a verb. Imports nothing that takes time before arguments are known to be good."""
