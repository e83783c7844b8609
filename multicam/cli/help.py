"""The `--help` of a command, and the lists in it."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from inspect import getdoc
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which imports torch
    from multicam.metrics.measures import Metric

# Words that `read_target` and `read_grid` understand: what a help lists, and an error proposes.
TARGETS = {
    "top": "the highest-scoring class of each sample (the default)",
    "3": "the score of a class, counted from 0",
    "3,1,0": "the same, one class per sample",
    "prob:3": "the probability of a class",
    "contrast:3,5": "class 3 rather than class 5; others may follow",
    "binary": "the only logit",
    "binary:no": "its negative",
    "regression": "the only predicted number",
    "regression:2": "one of several, counted from 0",
}
OWN_TARGET = {"MODULE:FUNC": "your own function from the output to one score per sample"}
GRIDS = {
    "14x14": "the tokens are a grid of 14 rows and 14 columns",
    "14x14+1": "behind one class or register token",
    "14x14@197": "from token 197 on, counted from 0, in a longer sequence",
    "14x14,sequence-first": "the layer returns (n b c); may follow any of these",
    "channels-last": "the layer returns (b h w c)",
    "as-it-is": "the layer returns (b c h w), or a signal (b c l)",
}


class Command(argparse.ArgumentParser):
    """A parser whose help has lists in it; only a help that lists methods or metrics waits for torch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def format_help(self) -> str:
        """The help, with the lists in their places."""
        text = super().format_help()
        for place, described in _LISTS.items():
            if place in text:
                text = text.replace(place, described())
        return text


def describe_targets() -> str:
    """The words that mean a target, each with what it means."""
    return f"targets:\n{_words(TARGETS | OWN_TARGET)}"


def describe_grids() -> str:
    """The words that mean a grid, each with what it means."""
    title = 'grids, for layers of tokens where nothing proves the grid; as in rgb=14x14 of the layer called "rgb":'
    return f"{title}\n{_words(GRIDS)}"


def describe_methods() -> str:
    """The methods of `multicam explain`, each with what it is in one sentence.

    Example:
        >>> " ".join(describe_methods().splitlines()[0].split())
        'gradcam Grad-CAM: channels weighted by their spatially averaged gradient.'
    """
    from multicam.cam.catalogue import INPUT_METHODS, METHODS

    of_layers, of_inputs = (
        _summaries((kind.__name__.lower(), kind) for kind in kinds) for kinds in (METHODS, INPUT_METHODS)
    )
    return f"{of_layers}\n\nmethods of whole inputs:\n{of_inputs}"


def describe_attributions() -> str:
    """The methods of `multicam saliency`, each with what it is in one sentence.

    Example:
        >>> " ".join(describe_attributions().splitlines()[0].split()[:3])
        'gradient The gradient'
    """
    from multicam.saliency.catalogue import ATTRIBUTIONS

    return _summaries((function.__name__, function) for function in ATTRIBUTIONS)


def describe_metrics() -> str:
    """The metrics of `multicam evaluate`, each with what is better of it and what it tells.

    Example:
        >>> " ".join(describe_metrics().splitlines()[0].split())
        'deletion down: the score while the marked places go'
    """
    from multicam.metrics.measures import METRICS

    return _columns((metric.name.replace(" ", "-"), _directed(metric)) for metric in METRICS.values())


_LISTS: dict[str, Callable[[], str]] = {
    "{targets}": describe_targets,
    "{grids}": describe_grids,
    "{methods}": describe_methods,
    "{attributions}": describe_attributions,
    "{metrics}": describe_metrics,
}


def _words(words: Mapping[str, str]) -> str:
    return "".join(f"  {word:22}{meaning}\n" for word, meaning in words.items())


def _directed(metric: "Metric") -> str:
    return f"{metric.better}: {metric.about}" if metric.better else metric.about


def _summaries(objects: Iterable[tuple[str, object]]) -> str:
    """The first sentence of each object's documentation behind its name."""
    return _columns((name, " ".join((getdoc(value) or "").split("\n\n")[0].split())) for name, value in objects)


def _columns(said: Iterable[tuple[str, str]]) -> str:
    """What is said of each name, behind it."""
    lines = dict(said)
    column = max(map(len, lines)) + 2
    return "\n".join(
        fill(f"{name:{column}}{text}", width=96, initial_indent="  ", subsequent_indent=" " * (column + 2))
        for name, text in lines.items()
    )
