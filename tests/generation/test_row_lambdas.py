"""Each row's λ at each token, looked up by prompt however often generate repeats it."""

import pytest
import torch

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, LambdaError
from flexalign.generation.row_lambdas import RowDials, TagTokens
from flexalign.lambdas import Fixed, Schedule

LINEAR = Schedule.parse({"kind": "linear", "start": 0, "end": 2, "steps": 4})
TOKENS = torch.zeros(1, 1).long()


def at(dials, rows, index):
    return dials.at(torch.tensor(rows), index, TOKENS.expand(len(rows), -1)).tolist()


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.5, [0.5, 0.5]),
        ([0.25, 2], [0.25, 2]),
        ((Fixed(1), torch.tensor(0.5)), [1, 0.5]),
        (torch.tensor(3), [3, 3]),
        (torch.tensor([0.5, -1.0]), [0.5, -1]),
        (torch.tensor([[1.0, 0.5], [2.0, 0.0]]), [0.5, 0.0]),
        ([LINEAR, 0.75], [1.5, 0.75]),
        ({"policy": "fixed", "lambda": 0.5}, [0.5, 0.5]),
    ],
    ids=str,
)
def test_lambda_at_the_fourth_token(lam, expected):
    dials = RowDials.of(lam, 2)
    assert at(dials, [0, 1], 3) == expected
    assert at(dials, [1, 1, 0], 3) == [expected[1], expected[1], expected[0]]


def test_what_is_known_beforehand():
    dials = RowDials.of([0, 1.0, 0.5, LINEAR, {"kind": "constant", "start": 1}], 5)
    assert dials.ends == [0.0, 1.0, None, None, 1.0]
    assert (dials.least, dials.largest) == (0.0, 2.0)
    table = RowDials.of(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 3)
    assert table.ends == [0.0, None, 1.0]
    assert not dials.follow_thinking
    assert RowDials.of({"kind": "thinking", "think": 0, "answer": 1}, 1).follow_thinking


def test_where_the_thinking_is(tiny_tokenizer):
    tags = TagTokens(tiny_tokenizer, ThinkingTags())
    rows = [
        [tags.open, 9, 9, 9, 9],
        [9, 9, 9, 9, tags.open],
        [9, 9, tags.open, 9, tags.close],
        [tags.open, 9, tags.close, tags.open, 9],
        [9, 9, 9, 9, 9],
    ]
    inside, index = tags.place(torch.tensor(rows))
    assert inside == [True, True, False, True, False]
    assert [index[0], index[1], index[3]] == [4, 0, 1]


def test_tags_of_several_tokens_are_refused(tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"'<reason>' is \d+ tokens here"):
        TagTokens(tiny_tokenizer, ThinkingTags("<reason>", "</reason>"))


@pytest.mark.parametrize(
    ("lam", "error"),
    [
        ([0.5], LambdaError),
        (torch.zeros(3), LambdaError),
        (torch.zeros(2, 0), LambdaError),
        (torch.zeros(2, 1, 1), LambdaError),
        (torch.tensor([0.0, float("nan")]), LambdaError),
        ([0.5, "x"], ConfigError),
        ([0.5, None], LambdaError),
    ],
    ids=str,
)
def test_refusals(lam, error):
    with pytest.raises(error):
        RowDials.of(lam, 2)


def test_the_first_lambda_is_known_before_the_first_token(tiny_tokenizer):
    opening = tiny_tokenizer.convert_tokens_to_ids("<think>")
    tags = TagTokens(tiny_tokenizer, ThinkingTags("<think>", "</think>"))
    thinking = Schedule.parse({"kind": "thinking", "think": 0.0, "answer": 3.0})
    linear = Schedule.parse({"kind": "linear", "start": -1, "end": 3, "steps": 6})
    dials = RowDials.following([Fixed(0.5), linear, thinking, thinking])
    assert dials.first.tolist() == [0.5, -1.0, 3.0, 3.0]
    prompts = torch.tensor([[7, 8], [7, opening], [7, opening], [7, 8]])
    assert dials.begin(prompts, tags).first.tolist() == [0.5, -1.0, 0.0, 3.0]
    assert RowDials.of(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 2).first.tolist() == pytest.approx(
        [0.1, 0.3]
    )
