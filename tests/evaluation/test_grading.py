import pytest

from flexalign.data.thinking import ThinkingTags
from flexalign.evaluation.grading import Grade, grade


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("<think>1+2=3 ; 3+4=7</think> 7", "7"),
        ("7.", "7"),
        ("**7**", "7"),
        ("7.0", "7"),
        ("1,234", "1234"),
        ("She makes $18 a day.", "18"),
        ("16-3=13, then 13*2=26", "26"),
        ("It is −5", "-5"),
        ("The answer is 18 because 3 times 6 is that.", "18"),
        ("The final answer is: 18.", "18"),
        ("Answer: 18\nI hope that 2 lines do not hurt.", "18"),
        ("work 9 * 2\n#### 18", "worked with <<9*2=18>>18\n#### 18"),
        (r"First \boxed{3}, no: \boxed{ 5 }.", "5"),
        (r"so $\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{east}}", "east"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        ("p - q", "p-q"),
        ("5", r"It is \boxed{5}."),
    ],
)
def test_a_right_answer_is_found_in_whatever_dress(response: str, gold: str) -> None:
    result = grade(response, gold)
    assert (result.correct, result.status) == (True, "correct")


@pytest.mark.parametrize(
    ("response", "gold", "extracted"),
    [
        ("<think>the answer is 7</think> 8", "7", "8"),
        (r"<think>\boxed{7}</think> \boxed{8}", "7", "8"),
        (r"\boxed{7} or rather \boxed{8}", "7", "8"),
        ("10-7", "-7", "7"),
        ("70", "7", "70"),
        ("0.7", "7", "0.7"),
        ("west", "east", "west"),
    ],
)
def test_a_wrong_answer_is_shown(response: str, gold: str, extracted: str) -> None:
    assert grade(response, gold) == Grade(False, "wrong", extracted)


@pytest.mark.parametrize(
    ("response", "truncated", "status"),
    [
        ("", False, "no_answer"),
        ("<think>1+2=3</think>  ", False, "no_answer"),
        ("<think>7 and 7 again", False, "no_answer"),
        ("<think>7 and 7 again", True, "truncated"),
        ("", True, "truncated"),
        ("The answer is 7", True, "truncated"),
        (r"\boxed{7", True, "truncated"),
        ("I do not know.", False, "unparsed"),
    ],
)
def test_no_answer_is_told_apart_from_a_wrong_one(
    response: str, truncated: bool, status: str
) -> None:
    assert grade(response, "7", truncated=truncated) == Grade(False, status, None)


def test_a_complete_box_counts_although_the_rest_was_cut_off() -> None:
    assert grade(r"\boxed{7} To check this", "7", truncated=True).correct


def test_several_lines_without_a_mark_hold_no_textual_answer() -> None:
    assert grade("one idea\nanother idea", "east").status == "unparsed"


def test_thinking_that_the_prompt_opened_earns_nothing() -> None:
    assert grade("it must be 7", "7", opened=True).status == "no_answer"
    assert grade("it may be 6</think>7", "7").correct


def test_tags_can_be_named() -> None:
    tags = ThinkingTags("[THINK]", "[/THINK]")
    assert grade("[THINK]8[/THINK]7", "7", tags=tags).correct
    assert grade("[THINK]7[/THINK]", "7", tags=tags).status == "no_answer"
