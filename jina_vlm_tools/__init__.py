# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Everything of jina-vlm that is run. The package `jina_vlm` never imports it.

cli         the command `jina-vlm`, a module a verb
engines     checkpoints for llama.cpp, ONNX Runtime, OpenVINO and browsers, and models that these run
inference   loading, conversations, tilings, many images, a server
hub         from a checkpoint to a page on the Hub: assemble, card, check, push
webapp      a page to try the model on, and the Space made of it
training    data, collator, trainer
retrieval   finding pages by the same weights: embeddings, scores, training, an index
synthetic   drawn images with questions whose answers are known
sources     what checkpoints and images are named by
files       where things lie, and the one way to write them
extras      optional dependencies, and what is said where one is not installed
markdown    tables
"""
