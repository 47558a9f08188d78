import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.evaluation.answers import find_boxed
from flexalign.evaluation.grading import Answered, Grade, Grader, WorkerPool, grade


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
        ("10-7", "-7", "10-7"),
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


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("The capital of France is Paris.", "Paris", "unparsed"),
        ("The answer is the city of Paris.", "Paris", "unparsed"),
        ("Yes, it is.", "yes", "unparsed"),
        ("Paris.", "Paris", "correct"),
        ("The answer is Paris.", "Paris", "correct"),
        (r"The capital is \boxed{Paris}.", "Paris", "correct"),
        (r"The capital is \boxed{Lyon, not Paris}.", "Paris", "wrong"),
        ("#### Los Angeles", "Paris", "wrong"),
        ("Lyon", "Paris", "wrong"),
        ("Los Angeles", "New York", "wrong"),
    ],
)
def test_a_sentence_is_no_answer_where_words_are_known(
    response: str, gold: str, status: str
) -> None:
    assert grade(response, gold).status == status


def test_thinking_that_the_prompt_opened_earns_nothing() -> None:
    assert grade("it must be 7", "7", opened=True).status == "no_answer"
    assert grade("it may be 6</think>7", "7").correct


def test_tags_can_be_named() -> None:
    tags = ThinkingTags("[THINK]", "[/THINK]")
    assert grade("[THINK]8[/THINK]7", "7", tags=tags).correct
    assert grade("[THINK]7[/THINK]", "7", tags=tags).status == "no_answer"

    opening, final = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
    channels = ThinkingTags(opening, f"<|end|><|start|>assistant{final}")
    cut = r"\boxed{8}, or \boxed{7}"
    assert grade(opening + cut, "7", tags=channels).status == "no_answer"
    assert grade(cut, "7", tags=channels, opened=True).status == "no_answer"
    assert grade(f"{opening}8{channels.close}7", "7", tags=channels).correct
    assert grade(f"{final}7", "7", tags=channels).correct


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seconds=20) as made:
        yield made


EQUAL = {
    r"\frac{1}{3}": [r"\frac13", "1/3", r"\tfrac{2}{6}", "3^{-1}", r"0.\overline{3}", "(1/3)"],
    r"\frac{7}{4}": ["1.75", "7/4", r"1\frac{3}{4}", r"\frac{2(\frac{7}{4})}{2}", r"\frac{14}{8}."],
    "7/4": ["1 3/4", r"1\;3/4", "1.75"],
    "137 \\frac{1}{2}": ["137.5", r"\frac{275}{2}", r"137\tfrac12"],
    ".0000672": [r"6.72\times 10^{-5}", "6.72e-5"],
    "11,\\! 111,\\! 100": ["11111100", "11,111,100", r"11\,111\,100"],
    "0.15": [r"15\%", r"\frac{3}{20}"],
    r"2\sqrt{5}": [r"\sqrt{20}", r"2\sqrt5", "2*sqrt(5)", "2√5", r"\frac{10}{\sqrt5}"],
    r"12\pi": ["12π", "12 pi", r"\pi \cdot 12"],
    "6 - 5i": ["-5i+6", r"6-5\mathrm{i}"],
    "106^\\circ": ["106", "106°", r"106\text{ degrees}", "106 degrees"],
    r"15\mbox{ cm}^2": ["15", "15 cm^2", r"15~\mathrm{cm}^2", "15 square centimeters"],
    r"\$18.90": ["18.9", r"18.90 \text{ dollars}"],
    "(a+5)(b+2)": ["(b+2)(a+5)", "ab+2a+5b+10", "$(a+5)(b+2)$"],
    "p - q": ["-q+p", "-(q-p)"],
    "x=5": ["5", "x = 5"],
    "y = 2x + 3": ["2x+3", "y-2x-3=0"],
    r"x \in [-2,7]": ["[-2,7]", r"-2 \le x \le 7"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(3,\infty)\cup(-\infty,2)", "(-∞,2)∪(3,∞)"],
    "1,-2": ["-2, 1", r"\{1,-2\}", r"1\text{ and }-2", "x=1 or x=-2"],
    r"1 \pm \sqrt{19}": [r"1+\sqrt{19}, 1-\sqrt{19}"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3,\pi/2)", r"\left(3,\tfrac{\pi}{2}\right)"],
    r"\begin{pmatrix} 1/5 \\ -2 \end{pmatrix}": [r"\begin{bmatrix}0.2\\-2\end{bmatrix}"],
    r"\cot x": [r"\cot(x)", r"\frac{\cos x}{\sin x}"],
    "204_5": ["204_{5}", r"204_{\text{5}}", "204", "(204)_5", r"\left(204\right)_{5}"],
    "(2A)_{12}": ["2A_{12}", "(2a)_{12}", "2A"],
    "-1 3/4": ["-7/4", r"-\frac{7}{4}", "-1.75"],
    r"\text{(B)}": ["B", "(B)", r"\textbf{(B)}", "(B) 14"],
    r"\text{Evelyn}": ["Evelyn", "evelyn"],
    "025": ["25", "25.0", "25 ways", r"n = 25"],
}


@pytest.mark.parametrize("gold", EQUAL)
def test_equivalent_forms_are_right(grader: Grader, gold: str) -> None:
    forms = [gold, *EQUAL[gold]]
    grades = grader.grade_many([Answered(f"So \\boxed{{{form}}}.", gold) for form in forms])
    assert [grade.status for grade in grades] == ["correct"] * len(forms)


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        (r"\frac{1}{3}", "0.333"),
        (".0000672", r"6.73 \times 10^{-5}"),
        ("204_5", "204_6"),
        ("204_5", "205_5"),
        ("204_5", "(204)_6"),
        ("204_5", "(204_5"),
        ("1 3/4", "13/4"),
        ("13/4", "1 3/4"),
        ("-1 3/4", "-1/4"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2)"),
        (r"x \in [-2,7]", "(-2,7)"),
        ("3, 5, 7", "3, 5"),
        ("1+2i", "1-2i"),
        ("p - q", "q - p"),
        ("x=5", "y=5"),
        ("2k", "2m"),
        ("2", "2 pi"),
        (r"\pi", "3.14"),
        ("east", "seat"),
        (r"\text{(B)}", "(C)"),
        (r"\text{(B)}", "Both"),
        (r"15\mbox{ cm}^2", "225"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ],
)
def test_what_looks_alike_is_wrong(grader: Grader, gold: str, found: str) -> None:
    assert grader.grade(f"\\boxed{{{found}}}", gold) == Grade(False, "wrong", found)


def test_what_no_mathematics_can_be_made_of_is_unparsed(grader: Grader) -> None:
    assert grader.grade(r"\boxed{\frac{1}}", r"\frac{1}{2}").status == "unparsed"
    assert grader.grade(r"\boxed{}", r"\frac{1}{2}").status == "unparsed"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"The answer is $\frac{1}{2}$, as asked.", "0.5"),
        (r"We find \(x+1\), and so $1+x$.", "x+1"),
        ("one idea\nanother\n" + r"\[ \frac{2}{4} \]", r"\frac{1}{2}"),
    ],
)
def test_a_formula_outside_a_box_is_found(grader: Grader, answer: str, gold: str) -> None:
    assert grader.grade(answer, gold).correct


def test_the_last_complete_box_counts_whatever_stands_around_it() -> None:
    assert find_boxed(r"{ \boxed{7}, so \boxed{\{1, {2}\}} and {8") == r"\{1, {2}\}"
    assert find_boxed(r"\boxed{\left\{ x \right.} } \boxed{\begin{x} a \\{b} \end{x}}") == (
        r"\begin{x} a \\{b} \end{x}"
    )
    assert find_boxed("\\boxed{" * 20_000) is None


@pytest.mark.slow
@pytest.mark.parametrize("hostile", ["9^{9^{9^9}}", "(" * 20_000, "{" * 20_000 + "}" * 20_000])
def test_a_hostile_answer_costs_its_limit_and_nothing_else(hostile: str) -> None:
    with Grader(seconds=5) as grader:
        items = [Answered(f"\\boxed{{{text}}}", r"\frac{1}{2}") for text in (hostile, "7")]
        assert [g.status for g in grader.grade_many(items)] == ["unparsed", "wrong"]
        assert grader.grade(r"\boxed{1/2}", "0.5").correct


def test_a_worker_that_dies_is_replaced() -> None:
    pool = WorkerPool(1, seconds=20)
    assert pool.compare("x+1", "1+x") == "equal"
    worker = pool._idle.get()
    assert worker._process is not None
    worker._process.kill()
    pool._idle.put(worker)
    assert pool.compare("x+2", "2+x") == "equal"
    pool.close()


def test_an_answer_given_often_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def compare_many(self: WorkerPool, pairs: list[tuple[str, str]]) -> list[str]:
        asked.extend(pairs)
        return ["equal"] * len(pairs)

    monkeypatch.setattr(WorkerPool, "compare_many", compare_many)
    with Grader() as grader:
        grader.grade_many([Answered(r"\boxed{1+x}", "x+1")] * 8 + [Answered("7", "7")] * 8)
        grader.grade(r"\boxed{1+x}", "x+1")
    assert asked == [("1+x", "x+1")]


def test_golds_that_cannot_be_parsed_are_told_apart(grader: Grader) -> None:
    golds = ["7", "east", "204_5", "#### 18", r"\frac{1}{2}", r"\frac{1}{", "???", " ", "x+"]
    assert grader.readable(golds) == [True] * 5 + [False] * 4


def test_a_grader_needs_workers_and_time() -> None:
    with pytest.raises(ConfigError, match="at least one worker"):
        Grader(workers=0)
    with pytest.raises(ConfigError, match="positive limit"):
        Grader(seconds=0)


def test_the_program_that_compares_answers_until_its_input_ends() -> None:
    pairs = {
        ("x+1", "1+x"): "equal",
        ("x+1", "x+2"): "unequal",
        ("0.3333333", r"\frac{1}{3}"): "equal",
        ("0.333", r"\frac{1}{3}"): "unequal",
        (r"0.\overline{3}", r"\frac{1}{3}"): "equal",
        ("12 cm", "12"): "equal",
        ("0.0000123", "0.0000124"): "unequal",
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"): "equal",
        ("", "7"): "unparsed",
        ("7", "???"): "unparsed",
        ("x+", "7"): "unparsed",
    }
    lines = [json.dumps({"found": f, "expected": e, "seconds": 20}) + "\n" for f, e in pairs]
    command = [sys.executable, "-P", "-m", "flexalign.evaluation.equality"]
    done = subprocess.run(
        command, input="".join(lines), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["ready", *pairs.values()]


def test_a_program_that_does_not_start_is_said_with_the_way_to_see_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"does not start; see why with: /bin/false -P -m"):
        WorkerPool(1, seconds=1).compare("x+1", "1+x")
