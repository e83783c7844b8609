"""Side-by-side measurements of multicam and its peers; run from the repository root with `python -m`."""
