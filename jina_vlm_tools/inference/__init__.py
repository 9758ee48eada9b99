"""The model at work: behind the servers that engines bring, and over many pictures."""
