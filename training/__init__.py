"""Training and evaluation of the small checkpoint in `checkpoints/tiny`. Nothing in the bundle imports this."""
