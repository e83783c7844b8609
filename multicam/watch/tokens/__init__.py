"""What becomes of the tokens of a pass: which part of which input each of them is, operation by operation."""
