"""Tools of the repository itself. Nothing of the bundle needs them."""
