"""Makes the folder a package. Nothing is lost."""
