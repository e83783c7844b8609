"""What the package says of a case against the truth, method by method, and whether it left everything as it was."""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import multicam as mc
from multicam.metrics.faithfulness import deletion
from tests.fuzz import formulas, layers, naive
from tests.fuzz.layers import Place
from tests.fuzz.models import LAYOUTS, Spec, build, call_of, inputs, leaf
from tests.fuzz.naive import Case, NoAnswerError

EXACT = 1e-6  # of the largest value


@dataclass(frozen=True)
class Failure:
    """What was wrong of a method: "false", "refused", "crashed" or "changed"."""

    method: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Check:
    """One call of the package, and the truth of it.

    Attributes:
        method: Its name.
        ask: From the model and the call to numbers.
        truth: From the case to the same numbers.
        single: Whether the numbers are differences of scores in single precision.
        several: The names along the first axis, where several methods are asked at once.
    """

    method: str
    ask: Callable[[nn.Module, Any], Tensor]
    truth: Callable[[Case], Tensor]
    single: bool = False
    several: Sequence[str] = ()


def failures(spec: Spec, only: str | None = None) -> list[Failure]:
    """What is wrong with a spec, of all methods or one."""
    try:
        case = Case(spec)
    except NoAnswerError:
        return []
    found = []
    for check in checks(case):
        if only in (None, check.method, *check.several):
            found += _failures(case, check)
    return found


def _failures(case: Case, check: Check) -> Iterator[Failure]:
    truth = _truth(case, check)
    spec = case.spec
    model, call = build(spec), call_of(spec, inputs(spec))
    if spec.again:  # what is remembered of a model must not be taken for true of other inputs
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            check.ask(model, call_of(spec, inputs(replace(spec, seed=spec.seed + 1))))
    before = state(model, call)
    try:
        with warnings.catch_warnings(action="ignore"), torch.set_grad_enabled(not spec.no_grad):
            answer = check.ask(model, call)
    except mc.MulticamError as error:
        answer = None
        # No pass tells which list has an item for each row, where a row is another one alone; brute force has taken checkpoints out; and which
        # of several threads is the first, chance decides for it, too.
        allowed = (case.company and "cannot tell whether" in str(error)) or any(
            words in str(error) for words in ("torch.utils.checkpoint", "chance decides")
        )
        if truth is not None and not allowed:
            yield Failure(check.method, "refused", str(error))
    except Exception as error:  # whatever it is, it is wrong
        answer = None
        yield Failure(check.method, "crashed", f"{type(error).__name__}: {error}")
    changes = [name for name, value in state(model, call).items() if not same(before.get(name), value)]
    if changes:
        yield Failure(check.method, "changed", ", ".join(changes[:5]))
    if answer is None or truth is None:
        return
    if answer.shape != truth.shape:
        yield Failure(check.method, "false", f"{tuple(answer.shape)} instead of {tuple(truth.shape)}")
        return
    for i, method in enumerate(check.several or [check.method]):
        wrong, right = (answer[i], truth[i]) if check.several else (answer, truth)
        size = float(right.abs().max())
        off = float((wrong.double() - right).abs().max())
        allowed = EXACT * max(size, case.size if check.single else 1e-6 * case.size)
        if torch.isfinite(right).all() and not off <= allowed and _steady(case, check, truth, i, allowed):
            yield Failure(method, "false", f"off by {off / max(size, 1e-300):.2g}")


def _truth(case: Case, check: Check) -> Tensor | None:
    if case.company and case.pair > 1:  # a row that cannot be without company which counts
        return None
    try:
        found = check.truth(case).detach()
    except NoAnswerError:
        return None
    return found if check.several or torch.isfinite(found).all() else None


def _steady(case: Case, check: Check, truth: Tensor, part: int, allowed: float) -> bool:
    """Whether the truth stays where it is if the inputs change in their last digits."""
    for jitter in (1e-11, -1e-11):
        try:
            other = _truth(Case(case.spec, jitter), check)
        except NoAnswerError:
            return False
        if other is None:
            return False
        moved = (other - truth)[part] if check.several else other - truth
        if not float(moved.abs().max()) <= allowed:
            return False
    return True


def checks(case: Case) -> Iterator[Check]:
    """All that is asked about a case."""
    draw = random.Random(case.spec.seed)
    yield from _of_inputs(case, draw)
    found = layers.places(case)
    for place in draw.sample(found, min(2, len(found))):
        yield from _of_layer(case, place, draw)


def _of_inputs(case: Case, draw: random.Random) -> Iterator[Check]:
    spec = case.spec
    target = _target(case)
    images = [stream.name for stream in spec.streams if LAYOUTS[stream.kind] == "image" and stream.kind != "bag"]
    floating = [stream.name for stream in spec.streams if stream.kind != "ids"]
    players = [stream.name for stream in spec.streams]
    if "ignored" in spec.sides:
        floating.append("ignored")
        images.append("ignored")
        players.append("ignored")
    wrt = draw.sample(floating, draw.randint(1, len(floating))) if floating else []
    size = {"batch_size": spec.batch_size}
    full = [leaf(spec, name) for name in wrt]

    def joined(found: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([x.flatten() for x in found.values()])

    if wrt and (spec.batch == 1 or not case.company):
        yield Check(
            "gradient",
            lambda m, x: joined(mc.gradient(m, x, target, wrt=full, output=_output(spec))),
            lambda c: joined(naive.gradient(c, wrt)),
        )
        yield Check(
            "input_x_gradient",
            lambda m, x: joined(mc.input_x_gradient(m, x, target, wrt=full, output=_output(spec))),
            lambda c: joined(naive.input_x_gradient(c, wrt)),
        )
    if wrt:
        base = draw.choice([0.0, 0.5])
        yield Check(
            "integrated_gradients",
            lambda m, x: joined(
                mc.integrated_gradients(m, x, target, wrt=full, output=_output(spec), steps=3, baseline=base, **size)
            ),
            lambda c: joined(naive.integrated_gradients(c, wrt, 3, base)),
        )
        std = draw.choice([0.0, 0.2])
        yield Check(
            "smoothgrad",
            lambda m, x: joined(
                mc.smoothgrad(m, x, target, wrt=full, output=_output(spec), samples=3, std=std, **size)
            ),
            lambda c: joined(naive.smoothgrad(c, wrt, 3, std)),
        )
    chosen = draw.choice([*images, None])
    if chosen is not None:
        yield Check(
            "occlusion",
            lambda m, x: mc.occlusion(
                m, x, target, patch=3, stride=2, wrt=leaf(spec, chosen), output=_output(spec), **size
            )[leaf(spec, chosen)],
            lambda c: naive.occlusion(c, chosen, 3, 2, 0.0),
        )
    yield from _of_players(case, players, draw)
    if images:
        yield from _of_places(case, images, draw)


def _of_players(case: Case, names: Sequence[str], draw: random.Random) -> Iterator[Check]:
    spec, target = case.spec, _target(case)
    some = draw.sample(names, draw.randint(1, min(3, len(names))))
    groups = [some[:2], *([name] for name in some[2:])] if draw.random() < 0.2 else [[name] for name in some]
    absent = {name: torch.full_like(case.values[name][:1], float(draw.choice([0, 0, 1]))) for name in some}
    options: dict[str, Any] = {"baseline": {leaf(spec, name): x for name, x in absent.items()}}
    if draw.random() < 0.3 and "prompts" not in spec.sides:  # some of the sides come with references that are not read
        others = inputs(replace(spec, seed=spec.seed + 7, batch=2))
        options = {"references": call_of(spec, others)}
        absent = {name: others[name] for name in some}

    def ask(m: nn.Module, x: Any) -> Tensor:
        players = [[leaf(spec, name) for name in group] for group in groups]
        size = {"batch_size": spec.batch_size, "output": _output(spec)}
        found = mc.contribution(m, x, target, players=players, **options, **size)
        return torch.cat([found.shapley, found.nothing[:, None], found.scores[:, None]], 1)

    yield Check("contribution", ask, lambda c: naive.contribution(c, groups, absent), single=True)


def _of_places(case: Case, images: Sequence[str], draw: random.Random) -> Iterator[Check]:
    spec, target = case.spec, _target(case)
    cut = dict(zip(draw.sample(images, min(2, len(images))), draw.sample([(1, 2), (2, 1), (2, 2)], 2), strict=False))
    yield Check(
        "region_contribution",
        lambda m, x: (
            mc.region_contribution(
                m,
                x,
                target,
                regions={leaf(spec, name): each for name, each in cut.items()},
                baseline=0.3,
                output=_output(spec),
                batch_size=spec.batch_size,
            ).contribution.shapley
        ),
        lambda c: naive.region_contribution(c, cut, 0.3),
        single=True,
    )
    g = torch.Generator().manual_seed(spec.seed)
    maps = {
        name: torch.rand(spec.batch, *case.values[name].shape[2:], generator=g)
        for name in draw.sample(images, draw.randint(1, min(2, len(images))))
    }
    yield Check(
        "deletion",
        lambda m, x: (
            deletion(
                m,
                x,
                {leaf(spec, name): each for name, each in maps.items()},
                target,
                steps=4,
                output=_output(spec),
                batch_size=spec.batch_size,
            ).scores
        ),
        lambda c: naive.deletion(c, maps, 4, 0.0),
    )


def _of_layer(case: Case, place: Place, draw: random.Random) -> Iterator[Check]:
    spec, target = case.spec, _target(case)
    path = place.path if place.calls == 1 else f"{place.path}#{place.call}"
    layer = mc.Layer(path, pick=place.pick, reshape=mc.tokens(*place.grid) if place.tokens else mc.as_it_is)
    layer = replace(layer, onto=place.onto and leaf(spec, place.onto))
    images = [stream.name for stream in spec.streams if stream.kind in ("image", "photo")]

    def asked(method: Any, **options: Any) -> Callable[[nn.Module, Any], Tensor]:
        return lambda m, x: method(m, {"grid": layer}, output=_output(spec), **options)(x, target, signed=True)["grid"]

    def laid(truth: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
        return lambda c: layers.density(truth(c), place.size)

    def together(names: Sequence[str]) -> Callable[[nn.Module, Any], Tensor]:
        methods = [getattr(mc, name) for name in names]
        options = {"output": _output(spec), "signed": True}
        return lambda m, x: torch.stack(
            [each["grid"] for each in mc.explain_methods(m, x, {"grid": layer}, methods, target, **options).values()]
        )

    def truths(names: Sequence[str]) -> Callable[[Case], Tensor]:
        return lambda c: torch.stack([laid(lambda d, n=n: formulas.saliency(d, place, n))(c) for n in names])

    if spec.batch == 1 or not case.company:
        for names in ([*formulas.ONE_PASS], [*formulas.NO_GRADIENT]):
            yield Check("maps", together(names), truths(names), several=names)
        for name in (draw.choice([*formulas.ONE_PASS]), "ShapleyCAM"):
            yield Check(name, asked(getattr(mc, name)), laid(lambda c, name=name: formulas.saliency(c, place, name)))
    size = {"batch_size": spec.batch_size}
    yield Check("AblationCAM", asked(mc.AblationCAM, **size), laid(lambda c: layers.ablation(c, place)))
    if images and not place.tokens:
        masked = draw.sample(images, draw.randint(1, len(images)))
        options = {**size, "masked": [leaf(spec, name) for name in masked]}
        method, more, changes = draw.choice(
            [
                (mc.ScoreCAM, {}, [lambda mask, i: mask]),
                (mc.ISCAM, {"steps": 2}, [lambda mask, i: mask / 2, lambda mask, i: mask * 1.5]),
                (mc.SSCAM, {"samples": 2}, [partial(naive.noisy, 0), partial(naive.noisy, 1)]),
            ]
        )
        yield Check(
            method.__name__,
            asked(method, **options, **more),
            laid(lambda c: layers.masking(c, place, masked, changes)),
        )


def _target(case: Case) -> Any:
    return {
        "class": 1,
        "classes": [i % 3 for i in range(case.spec.batch)],
        "top": None,
        "function": naive.squares,
    }[case.spec.target]


def _output(spec: Spec) -> Any:
    return {"tensor": None, "dict": "logits", "tuple": 1}[spec.returns]


def state(model: nn.Module, call: Any) -> dict[str, Any]:
    """All of the user's that must stay as it is, by what it is."""
    found: dict[str, Any] = {
        "torch's random state": torch.get_rng_state(),
        "NumPy's random state": str(np.random.get_state()),  # noqa: NPY002
        # Python's is left out: the checks of types in the tests draw from it (see tests/whole/test_quiet_pass.py).
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ),
    }
    for path, module in model.named_modules():
        found[f"{path}: training"] = module.training
        found[f"{path}: attributes"] = sorted(vars(module))
        hooks = {name: len(value) for name, value in vars(module).items() if "_hooks" in name and value is not None}
        found[f"{path}: hooks"] = hooks
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}: value"] = x.detach().clone()
        found[f"{name}: gradient"] = None if x.grad is None else x.grad.clone()
        found[f"{name}: flags"] = (id(x), x.requires_grad)
    return found | dict(_leaves("inputs", call))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, mc.Inputs):
        value = (value.args, value.kwargs)
    if isinstance(value, dict | list | tuple):
        yield f"{name}: container", (type(value), [*value] if isinstance(value, dict) else len(value))
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}", each)
    else:
        if isinstance(value, Tensor):
            yield f"{name}: gradient", (value.requires_grad, value.grad)
        yield name, value.clone() if isinstance(value, Tensor) else value.copy() if hasattr(value, "dtype") else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b
