"""jina-vlm behind the servers that engines bring: what each needs to find this code, and one client for all."""
