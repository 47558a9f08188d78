import copy

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from flexalign.data import measure_lengths, split_tokens
from flexalign.errors import DataError


def _chat(*responses: str) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "what is one plus two"}],
                "completion": [{"role": "assistant", "content": response}],
            }
            for response in responses
        ]
    )


def _plain(*responses: str) -> Dataset:
    return Dataset.from_list([{"prompt": "1+2=", "completion": r} for r in responses])


RESPONSES = ("3", "1+2=3 and again 1+2=3", "<think>1+2=3</think>3")


@pytest.mark.parametrize("make", [_chat, _plain])
@pytest.mark.parametrize("max_length", [None, 30, 40])
def test_counts_are_those_of_the_trainer(
    make, max_length, tiny_tokenizer, tiny_model, tmp_path
) -> None:
    dataset = make(*RESPONSES)
    shortest = measure_lengths(dataset, tiny_tokenizer, None).shortest
    cut = None if max_length is None else shortest + max_length - 30
    lengths = measure_lengths(dataset, tiny_tokenizer, cut)
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_length=cut,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tiny_tokenizer)
    labels = [row["labels"] for row in trainer.train_dataset]
    assert lengths.rows == 3
    assert lengths.kept == len(labels)
    assert lengths.response_tokens == sum(label != -100 for row in labels for label in row)
    assert lengths.prompt_tokens == sum(label == -100 for row in labels for label in row)


def test_truncation_is_counted(tiny_tokenizer) -> None:
    dataset = _plain(*RESPONSES)
    whole = measure_lengths(dataset, tiny_tokenizer, None)
    assert (whole.kept, whole.truncated) == (3, 0)
    cut = measure_lengths(dataset, tiny_tokenizer, whole.longest - 1)
    assert (cut.kept, cut.truncated, cut.longest) == (3, 1, whole.longest)
    assert cut.response_tokens == whole.response_tokens - 1


def test_a_prompt_that_fills_the_cut_off_leaves_nothing_to_learn(tiny_tokenizer) -> None:
    dataset = Dataset.from_list(
        [
            {"prompt": "1", "completion": "2"},
            {"prompt": "one plus two plus three", "completion": "6"},
        ]
    )
    short = measure_lengths(dataset, tiny_tokenizer, None).shortest
    lengths = measure_lengths(dataset, tiny_tokenizer, short)
    assert (lengths.kept, lengths.truncated) == (1, 0)


def test_all_rows_too_long_is_refused_with_the_numbers(tiny_tokenizer) -> None:
    dataset = _chat(*RESPONSES)
    whole = measure_lengths(dataset, tiny_tokenizer, None)
    with pytest.raises(
        DataError,
        match=rf"all 3 rows are longer than the cut-off of 5 tokens "
        rf"\(the shortest has {whole.shortest}, the longest {whole.longest}\)",
    ):
        measure_lengths(dataset, tiny_tokenizer, 5)


def test_an_empty_data_set_is_refused(tiny_tokenizer) -> None:
    with pytest.raises(DataError, match="empty"):
        measure_lengths(_plain("1").select([]), tiny_tokenizer, None)


def test_a_template_that_drops_the_thinking_leaves_it_in_the_response(tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    )
    rows = list(split_tokens(_chat(*RESPONSES), tokenizer))
    assert [tokenizer.decode(response) for _, response in rows] == [
        f"{response}<|im_end|>" for response in RESPONSES
    ]


def test_conversations_need_a_template_that_takes_them(tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"roles user, assistant \(roles must alternate\)"):
        measure_lengths(_chat("1"), tokenizer, None)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        measure_lengths(_chat("1"), tokenizer, None)
    assert measure_lengths(_plain("1"), tokenizer, None).rows == 1
