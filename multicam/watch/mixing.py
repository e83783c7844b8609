"""The scores of calls whose inputs come from different samples, with each encoder run once for each sample and not for each call.

A module that depends on one of the mixed parts only returns for a mixed row what it returned for the sample that this part comes
from. So with encoders that see an input each, all combinations of k inputs cost what the fusion behind them costs.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.inputs import Inputs
from multicam.call.tree import rebuild
from multicam.errors import MulticamError
from multicam.watch.module_calls import Key, ModuleCall, Rows, confirmed, skipping, within
from multicam.watch.recorded import Confirming, Read, Recording
from multicam.watch.undisturbed import undisturbed


class Mixing:
    """The scores of rows that take each part of a call from another sample of it.

    One pass of the whole call records what each module returns, and which parts it depends on. Rows then run only what depends on
    several parts at once. A full pass of mixed rows checks the record, module by module, and its scores must come out of
    the short way; if they do not, all is run for every row from then on, with a warning.

    Args:
        model: Any module.
        inputs: The call, bound to the model.
        parts: Names of inputs that are taken from one sample together. All other inputs belong to a row's own sample.
        read: From an output, and the sample of the call that each of its rows belongs to, to scores.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> inputs = Inputs(torch.rand(3, 2), torch.rand(3, 2)).bind(model)
        >>> mixing = Mixing(model, inputs, [["input1"], ["input2"]], lambda output, samples: output[:, 0])
        >>> scores = mixing([[0, 0], [1, 2]], [0, 0])  # the second input of sample 1, then that of sample 2
        >>> x, y = inputs.args
        >>> torch.allclose(scores, model(x[[0, 0]], y[[1, 2]])[:, 0])
        True
    """

    def __init__(self, model: nn.Module, inputs: Inputs, parts: Sequence[Sequence[str]], read: Read) -> None:
        self._model, self._inputs, self._read = model, inputs, read
        self._part = {name: i for i, names in enumerate(parts) for name in names}
        self._count = len(parts)
        self._batch = inputs.batch
        self._calls: dict[Key, ModuleCall] = {}
        self._seen: dict[Key, int] = {}  # which parts each of them depends on, as bits
        self._proved = False
        with self._quietly():
            self.output, self.used = self._record()

    def __call__(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Float[Tensor, " n"]:
        """The scores of `n` rows.

        Args:
            parts: For each part the sample that each row takes it from.
            samples: The sample that each row belongs to, whose other inputs it has.
        """
        with self._quietly():
            if not self._proved:
                self._prove()
                self._proved = True
            return self._scores(parts, samples)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        with undisturbed(self._model, graph=False):
            yield

    def _call(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Inputs:
        batched = self._inputs.batched

        def mixed(name: str, leaf: Any) -> Any:
            if name not in batched:
                return leaf
            rows = parts[self._part[name]] if name in self._part else samples
            return leaf[torch.as_tensor(rows, device=leaf.device)]

        return self._inputs.map(mixed)

    def _scores(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Float[Tensor, " n"]:
        with self._skipping(parts, samples):
            output = self._call(parts, samples).own().run(self._model)
        return self._read(output, samples)

    def _full_scores(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Float[Tensor, " n"]:
        try:
            output = self._call(parts, samples).own().run(self._model)
        except (RuntimeError, ValueError, LookupError) as error:
            raise MulticamError(
                f"{type(self._model).__name__} ran with {self._batch} rows, but not with {len(samples)} whose inputs are mixed: {error}. "
                "Every input must have one row for each sample, or be the same for all and marked by Inputs(…).constant(name)"
            ) from error
        return self._read(output, samples)

    def _rows(self, key: Key, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> Sequence[int]:
        """The samples whose record a call returns for each row.

        With `f_i` a call that sees part i only, `f_i(row) = f_i(sample that the row takes part i from)`: a call that depends on the colour of one
        part returns its record in the order in which the rows take that part, and one that depends on none in that of their samples.
        """
        seen = self._seen[key]
        return parts[seen.bit_length() - 1] if seen else samples

    def _skipping(self, parts: Sequence[Sequence[int]], samples: Sequence[int]) -> AbstractContextManager[None]:
        """Let the modules that depend on one part return their record."""

        def returned(call: ModuleCall) -> Any:
            rows = self._rows(call.key, parts, samples)
            return rebuild(
                call.output, lambda path, x: call.rows[path][0].take(x, rows) if isinstance(x, Tensor) else x
            )

        return skipping(self._calls, returned)

    def _record(self) -> tuple[Any, list[bool]]:
        """The output of the whole call, and whether it depends on each part."""
        recording = Recording(self._model, most=1)
        call = self._inputs.own()
        leaves_now = call.leaves
        for name, part in self._part.items():
            recording.taint.mark(leaves_now[name], colours=1 << part)
        with recording.watch():
            output = call.run(self._model)
        colours = recording.taint.colours(output)
        self._calls, self._seen = recording.calls, recording.colours
        return output, [bool(colours >> i & 1) for i in range(self._count)]

    def _prove(self) -> None:
        """Keep of the record what a full pass of mixed rows confirms, and compare scores."""
        # The mixed row takes each part from a sample drawn by chance. What the record and the marks say must come out of a full pass of it, call by
        # call; and what the fusion makes of the record must be the full pass's score, up to rounding and a thousandth of the scores' standard deviation.
        n = 1  # another size than that of the record, which has a baseline besides, tells which axis is the batch
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self._batch, (self._count + 1, n + 1), generator=generator, device="cpu").tolist()
        parts, samples = [rows[-n:] for rows in drawn[:-1]], drawn[-1][-n:]

        def compare(record: ModuleCall, output: Any) -> dict[str, list[Rows]] | None:
            return confirmed(record, output, self._batch, self._rows(record.key, parts, samples))

        found = Confirming(self._model, self._calls, compare)
        with found.watch():
            expected = self._full_scores(parts, samples)
        self._calls = found.calls
        whole = self._read(self.output, range(self._batch))
        tolerance = float(found.rounding * torch.cat([expected, whole]).abs().max() + 1e-3 * whole.std())
        try:
            # In another place and company than before, which must not matter: the mixed row, and a sample as it is.
            *others, of = ([*rows, 0] for rows in drawn)
            agrees = within(self._scores(others, of)[-1 - n :], torch.cat([expected, whole[:1]]), tolerance)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            agrees = False
        if agrees:
            return
        self._calls = {}
        warnings.warn(
            f"running the fusion of {type(self._model).__name__} on recorded encodings does not give the scores of running all of it, "
            "so all of it is run for every combination: some of its modules do not depend on what they are given alone, or scores depend "
            "on what else is in the batch, or on the place in it (then batch_size=1 runs each combination alone)",
            stacklevel=2,
        )
