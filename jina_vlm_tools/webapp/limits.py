"""What the tabs of the page have in common: how much for how many."""

AT_ONCE = 2  # answers; others wait in a queue, and see that they do
MAX_NEW_TOKENS = 256
