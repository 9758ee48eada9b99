"""How the small checkpoint is made, and studies on it: recipes, results, what they showed."""
