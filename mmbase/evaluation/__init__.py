"""Zero-shot, retrieval, latency, and the report of a run."""
