"""Random models with several inputs, and what the package says of them against brute force."""
