"""Which part of the attention of each input's tokens goes to each input, by value."""

import pytest
import torch
from torch import Tensor, nn

from multicam import MulticamError
from multicam.attending.attend import record_attention
from multicam.attending.between import Between, between, flow_matrix, of_pass, samples
from multicam.watch.tokens.places import LOST
from tests.helpers.placed import own, places, tokens
from tests.helpers.recorded_net import NAMES, net, own_attention, pair


def test_shares_are_sums_over_the_keys_of_each_stream_and_means_over_its_queries() -> None:
    of = places()
    queries = torch.cat([tokens(of, "rgb", 1, 2), tokens(of, "words", 1)])[None]
    keys = torch.cat([tokens(of, "words", 2), tokens(of, "rgb", 1, 1)])[None]
    p = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]]])
    found = between(of, ("a",), [[(queries, keys, p)]])
    assert found.calls == ("a",) and found.queries == found.keys == ("rgb", "words")
    torch.testing.assert_close(found.shares, torch.tensor([[[[0.65, 0.35], [0.0, 1.0]]]]))


def test_own_tokens_and_lost_ones_are_streams_and_padding_counts_for_nobody() -> None:
    of = places()
    queries = tokens(of, "rgb", 1, 1)[None]
    keys = torch.cat([tokens(of, "words", 1), own(of), torch.tensor([LOST, 0])])[None]
    found = between(of, ("a",), [[(queries, keys, torch.tensor([[[0.1, 0.2, 0.1, 0.6]]]))]])
    assert found.keys == ("words", "own", "unknown")
    torch.testing.assert_close(found.shares, torch.tensor([[[[0.25, 0.5, 0.25]]]]))


def test_a_table_leaves_out_streams_that_ask_nothing() -> None:
    table = Between(("one", "two"), ("a", "b"), ("a",), torch.tensor([[[[1.0], [torch.nan]], [[0.5], [0.25]]]]))
    assert repr(table).splitlines() == [
        "attention  queries  a",
        "one        a        1",
        "two        a        0.5",
        "two        b        0.25",
    ]


def test_the_shares_of_a_recording_are_told_call_by_call_and_sample_by_sample() -> None:
    with torch.no_grad(), record_attention(model := net()) as att:
        model(*pair(3))
    table = flow_matrix(att)
    assert table.calls == tuple(NAMES)
    assert table.queries == ("x",) and table.keys == ("x", "y")
    to_y, to_itself = [0.0, 1.0], [1.0, 0.0]
    torch.testing.assert_close(table.shares[:, :, 0], torch.tensor([to_y, to_y, to_itself]).expand(3, 3, 2))
    assert samples(att) == 3


def test_attentions_of_one_pass_are_taken_and_others_refused() -> None:
    with torch.no_grad(), record_attention(model := net()) as att:
        model(*pair(1))
        model(*pair(2))
    assert of_pass(att, 1) == list(att[3:])
    assert of_pass(att[:2], None) == list(att[:2])
    with pytest.raises(MulticamError, match="the attentions are of the passes 0, 1: say which with forward=…"):
        of_pass(att, None)
    with pytest.raises(MulticamError, match="no attention is of pass 2; there are passes 0, 1"):
        of_pass(att, 2)
    with pytest.raises(MulticamError, match=r"give attentions of a recording, .*, not \[\]"):
        of_pass([], None)


def test_every_sample_has_shares_of_its_own() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return own_attention(torch.cat([x, y], 1))

    x, y = torch.rand(3, 5, 4), torch.rand(3, 2, 4)
    with torch.no_grad(), record_attention(model := Joined()) as att:
        model(x, y)
    z = torch.cat([x, y], 1)
    p = (z @ z.mT).softmax(-1)
    expected = [[p[:, q, k].sum(2).mean(1) for k in (slice(5), slice(5, 7))] for q in (slice(5), slice(5, 7))]
    found = flow_matrix(att).shares[:, 0]
    torch.testing.assert_close(found, torch.stack([torch.stack(row, 1) for row in expected], 1))
