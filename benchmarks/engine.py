"""What maps cost beside a bare forward pass: multicam and its peers, in one run, as Markdown.

Weights are random. Sides take turns within every repetition; ratios are those of medians.

    python -m benchmarks.engine --threads 1 --write docs/explanation/what-it-costs.md
    python -m benchmarks.engine --part gradient --part perturb --repeat 10
"""

from benchmarks import branches, catalogue, gradient, perturb, scaling
from benchmarks.command import mark, run

PARTS = {
    "branches": branches.part,
    "gradient": gradient.part,
    "perturb": perturb.part,
    "scaling": scaling.part,
    "catalogue": catalogue.part,
}
MARK = mark("benchmarks.engine")

if __name__ == "__main__":
    run("benchmarks.engine", __doc__ or "", PARTS)
