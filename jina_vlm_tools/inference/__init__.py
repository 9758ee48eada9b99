"""Answers: loading a checkpoint, a conversation, many images, a server; and what becomes of an image."""
