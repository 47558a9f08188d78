"""Answers as models write them: which are right, which only look so, and what math-verify says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexalign.data.thinking import ThinkingTags
from flexalign.evaluation.answers import find_boxes
from flexalign.evaluation.grading import Answered, Grader, grade

# math-verify's own pairs: the tests of its repository (Apache-2.0) at commit 5d148cf, long texts
# cut to the part that is read. `theirs` is its verdict; `why` says why ours is another.
PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "math_verify_pairs.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, seconds=20) as made:
        yield made


def _not_as_wanted(grader: Grader, answers: list[tuple[str, str]], *, correct: bool) -> list[str]:
    grades = grader.grade_many([Answered(response, gold) for gold, response in answers])
    return [
        f"{response!r} for {gold!r}: {grade.status}, {grade.extracted!r}"
        for (gold, response), grade in zip(answers, grades, strict=True)
        if grade.correct != correct
    ]


STATED = {
    "0.75": ["The answer is 3/4.", "#### 3/4", "It is ¾.", "Answer: $$\n\\frac{3}{4}\n$$"],
    "1024": ["The answer is $2^{10}$.", "So $x = 2^{10}$", "The answer is 2^10, of course."],
    "1000": ["The answer is 1e3.", "1 000", "It weighs 1,000g", "The answer is $10^3$."],
    "120": ["The answer is $5!$.", "5 * 4 * 3 * 2 * 1 = 120"],
    "14916": ["The final answer is $14{,}916$.", "#### 14,916", r"The answer is $14\,916$."],
    "4.123105625617661": [r"$\sqrt{17}$", "The answer is √17."],
    "1.75": ["The answer is 1 3/4 cups.", "The answer is $1\\frac{3}{4}$.", "She needs 1¾."],
    "50": ["The answer is 50%.", "The answer is 50 percent.", "It is $50$ %"],
    "-5": ["It is −5", "x = -5", "The answer is $-5$ degrees"],
    "16": ["So, she has (5 + 3) * 2 = 16 eggs left", "2 * 8 = <<2*8=16>>16 dollars"],
    "12": ["So the rest is $30 and the total is $12.", "It takes 12cm.", r"Thus $12\text{ cm}$."],
    "7": ["We have 3 + 4 = 7 apples", "n = 7 works.", "7 works", "The answer is $x=7$ cm."],
    "400": [
        "x=100 queen bees\nWorkers:4(100)=400 worker bees",
        "She pays $1500/month, or $400/day",
    ],
    "30": ["First 2*75=150 dragons for Arthur, or 150/5=30 dragons.", "It is horse #30"],
    "2.74": ["Cela coûte 2,74 €."],
    "2, 3": ["The answer is 2 or 3.", "Thus x = 2 or x = 3.", "The answer is 2, 3."],
    "(3,4)": ["The answer is (3, 4).", "The point is $(3, 4)$, which lies on it."],
    "x^2+1": ["the answer is x^2 + 1 for all x.", "x^2 + 1", "We find $x^2+1$."],
    r"\frac{1}{2}": [r"The answer is \frac{1}{2} of it.", "We get $\\frac{1}{2}$ in $n$ steps."],
    r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}": [
        r"The answer is \begin{pmatrix} 1 \\ -2 \end{pmatrix}",
    ],
    "10:30": ["It is 10:30.", "The answer is 10{:}30."],
    "28\\%": ["The answer is 28 %.", "a loss of 28 pct"],
}
BOXED = {
    "0.5": ["½", r"\text{(C) }\frac{1}{2}", "1 ÷ 2", "1⁄2", r"\frac12", r"\frac{1}{2}, 0.5"],
    "1.5": ["1½", r"1\frac12", "3∕2", "+1.5"],
    r"\frac{2}{3}": ["⅔", "2 ÷ 3", "4/6", "2:3"],
    "6": ["2 × 3", "2·3", "2 ⋅ 3", "6,0", r"\textbf{(B)}\ 2 \cdot 3"],
    "-5": ["−5", "–5", "-(5)"],
    "10:30": ["10{:}30", r"10\colon30", r"10{:}30 \text{ a.m.}", "10 : 30", "10:30 AM"],
    "7{:}05": ["7:05", "07:05"],
    "2:3": ["4:6", "2 : 3", r"\frac{2}{3}", "2{:}3"],
    "1:2:3": ["1 : 2 : 3", "2:4:6"],
    r"(-\infty,2)\cup(3,\infty)": [
        r"x<2 \text{ or } x>3",
        "x<2 or x>3",
        r"x < 2 \lor 3 < x",
        r"\{x \mid x<2 \text{ or } x>3\}",
        "(3,∞)∪(-∞,2)",
        r"\mathbb{R} \setminus [2,3]",
    ],
    r"x<2 \text{ or } x>3": [r"(-\infty,2)\cup(3,\infty)", r"x>3\text{ or }x<2"],
    r"x \le -1 \text{ or } x \ge \sqrt{8}": [r"(-\infty,-1]\cup[2\sqrt2,\infty)"],
    "(1,5)": [r"x>1 \text{ and } x<5", "1<x<5", r"\{x \in \mathbb{R} : 1<x<5\}", r"|x-3|<2"],
    "[5,7]": ["5 ≤ x ≤ 7", r"5 \leqslant x \leqslant 7", r"x \in [5,7]"],
    r"x\neq 2": [r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}\setminus\{2\}", "x ≠ 2"],
    r"[3,\infty)": ["x≥3", r"\{x : x \ge 3\}", r"3 \le x"],
    "y>2": ["2<y", r"\{x : x > 2\}", r"(2,\infty)"],
    r"\text{(B)}": [
        r"\textbf{(B)}\ 5",
        "B, since I see it",
        "B",
        "(B)",
        r"\textbf{(B) } \frac{1}{2}",
        "B) 5",
    ],
    "B": [r"\textbf{(B)}\ 5", "(B) 5", r"\text{B}"],
    "5": [r"\textbf{(B)}\ 5", "(B) 5", r"\textbf{(B)}~5", "B. 5"],
    r"\textbf{(B)}\ 5": ["B", "(B)", "5", r"\textbf{(B)} 5", "(B) 5.0"],
    r"\frac{1}{\sqrt{2}}": [r"\frac{\sqrt2}{2}", "√2/2", "2^{-1/2}", r"\sqrt{\frac12}", r"√(1/2)"],
    r"1+\sqrt2": [r"\sqrt{3+2\sqrt2}", "√2 + 1", r"\frac{1}{\sqrt2-1}"],
    "2^{1/3}": ["∛2", r"\sqrt[3]{2}", r"\frac{\sqrt[3]{16}}{2}"],
    r"\sqrt{x+1}": ["√(x+1)", "(x+1)^{1/2}", r"\sqrt{1+x}"],
    r"\emptyset": [r"\varnothing", "∅", r"\{\}", r"\text{no solution}", "No real solutions"],
    r"\text{no solution}": [r"\emptyset", r"\text{No solutions.}"],
    "x^2+1": ["x²+1", "x^{2}+1", "1 + x^2"],
    "204_5": ["204₅", "204_{5}"],
    r"\frac{1}{2^{98}}": ["2^{-98}", r"\left(\frac12\right)^{98}", "4^{-49}"],
    r"1.5\pi \cdot 10^{20}": [r"4.71238898038469 \times 10^{20}"],
    r"\sin^2 x": [r"1-\cos^2 x", r"\frac{1-\cos 2x}{2}"],
    "2 \\pmod 5": [r"x \equiv 2 \pmod{5}", "2", "2 (mod 5)"],
    r"1 - \frac{1}{\mathrm{e}}": ["1-1/e", r"\frac{e-1}{e}"],
}


@pytest.mark.parametrize("gold", STATED)
def test_without_a_box_the_whole_expression_is_the_answer(grader: Grader, gold: str) -> None:
    assert _not_as_wanted(grader, [(gold, each) for each in STATED[gold]], correct=True) == []


@pytest.mark.parametrize("gold", BOXED)
def test_forms_that_mean_the_same_are_right(grader: Grader, gold: str) -> None:
    forms = [(gold, f"Thus $\\boxed{{{form}}}$.") for form in BOXED[gold]]
    assert _not_as_wanted(grader, forms, correct=True) == []


NEAR_MISSES_STATED = {
    "3": ["The answer is 3/4.", "a 3-digit number", "3x", "The answer is 3 or 4.", "$3^2$", "3:4"],
    "2": ["The answer is $2^{10}$.", "The answer is x^2", r"$\frac{1+\sqrt{5}}{2}$", "AZYUK2A"],
    "10": [
        "The answer is $10^3$.",
        "So $x = 2^{10}$",
        "The answer is 10:30.",
        "10!",
        "5 + 5",
        "2 + 3 + 5",
    ],
    "5": ["The answer is $5!$.", "The answer is 5, 6.", "The answer is 5 - 3.", "5i", r"5\pi"],
    "7": ["The answer is 7/2 of it", "The answer is 0.7", "x > 7", "7e3", "$-7$", "(7, 8)", "70"],
    "1": ["$-[0,1)$", "The answer is $x_1$.", "The answer is $1 \\pm \\sqrt{2}$.", "1½", "1 000"],
    "4": ["$4\\sqrt{2}$", "The answer is 4√2.", "The answer is $\\sqrt[4]{2}$.", "4a + 1"],
    "1000": ["The answer is 1e4.", "100 0", "1,00", "The answer is 1.000,5"],
    r"\frac{1}{2}": ["The answer is 1/2 or 1/3.", "The answer is $\\frac{1}{2}x$.", "1/2/2"],
    "x^2+1": ["the answer is x^2 - 1.", "The answer is $y^2+1$.", "x^2"],
}
NEAR_MISSES_BOXED = {
    "0.5": ["⅓", "½½", "5", "0.50001", "(C) 5", "-½", "2"],
    "1.5": ["1⅓", "½", "15", "1 ½ ½"],
    "10:30": ["1:3", "10:03", "10:31", "1030", r"\frac13", "30:10", "10:30:30", "22:30"],
    "10:30 \\text{ a.m.}": ["10:30 p.m.", "11:30 a.m."],
    "1:3": ["10:30", "3:1", "1:4", "1:3:1"],
    "2:3": ["3:2", "4:9", r"\frac{3}{2}", "23"],
    "1:2:3": ["1:3:2", "1:2", "2:4:5", "3:2:1"],
    r"(-\infty,2)\cup(3,\infty)": [
        r"x<2 \text{ and } x>3",
        r"x\le2 \text{ or } x>3",
        r"x<2 \text{ or } x\ge3",
        r"x<2 \text{ or } y>3",
        r"x>2 \text{ or } x<3",
        "x<2",
        "2<x<3",
        "(2,3)",
        r"(-\infty,3)\cup(2,\infty)",
        r"x<2, x<3",
    ],
    "(1,5)": [r"x>1 \text{ or } x<5", r"1\le x<5", r"|x-3|<3", "1<x<4", "5<x<1", r"\{1,5\}"],
    "[5,7]": ["5<x<7", "(5,7]", "5,7", r"5 \le x", r"\{x : 5<x\le7\}"],
    r"x\neq 2": ["x=2", r"x\neq -2", r"\mathbb{R}", r"(-\infty,2]\cup[2,\infty)", "x<2"],
    r"[3,\infty)": ["x>3", "x≤3", r"(3,\infty)", r"[3,4]", "3"],
    r"\text{(B)}": [
        r"\textbf{(C)}\ 5",
        "(A)",
        "Both",
        "D",
        "BC",
        r"\text{A and B}",
        "B, C",
        "(B) or (C)",
        "A, B",
    ],
    "B": [r"\textbf{(C)}\ 5", "(D)", "2B"],
    "5": [r"\textbf{(B)}\ 6", "(E)", r"\textbf{(A)}\ -5", r"(B)\ 5,6", "B"],
    r"\textbf{(B)}\ 5": ["A", "6", r"\textbf{(C)}\ 5", r"\textbf{(B)}\ 6", "(C)"],
    r"\frac{1}{\sqrt{2}}": [r"\sqrt2", r"\frac{1}{2}", "0.707", r"-\frac{1}{\sqrt2}", "√(1/3)"],
    r"1+\sqrt2": [r"\sqrt{3+\sqrt2}", r"\sqrt{1+2}", r"1-\sqrt2", "2.41421", r"\sqrt{3-2\sqrt2}"],
    "2^{1/3}": ["∜2", r"\sqrt{2}", "3√2", "2/3", r"\sqrt[3]{3}"],
    r"\sqrt{x+1}": ["√x + 1", "√(x-1)", "x+1", r"\sqrt{y+1}"],
    r"\emptyset": [r"\{0\}", "0", r"\{\emptyset\}", r"\text{one solution}", "", r"\infty"],
    "204_5": ["204₆", "205₅", "402_5", "54"],
    "2^{-99}": ["2^{-98}", "0", "2^{99}", r"\frac{1}{2^{100}}", "10^{-30}", "-2^{-99}"],
    r"\frac{1}{2006!}": [r"\frac{1}{2004!}", "0", r"\frac{1}{2007!}"],
    "10^{-20}": ["10^{-21}", "0", "-10^{-20}", r"1.1 \cdot 10^{-20}"],
    "2^{-99}x": ["2^{-98}x", "0", "2^{-99}y"],
    "x=2^{-99}": ["x=2^{-98}", "x=0", "2^{-98}"],
    r"\{2^{-99},1\}": [r"\{2^{-98},1\}", r"\{0,1\}"],
    "(2^{-99},1]": ["(2^{-98},1]", "(0,1]"],
    r"\begin{pmatrix} 2^{-99} \\ 1 \end{pmatrix}": [r"\begin{pmatrix} 2^{-98} \\ 1 \end{pmatrix}"],
    r"\sqrt2": [r"\sqrt2+10^{-40}", "1.41421", "1.4142", r"\frac{99}{70}", r"-\sqrt2"],
    "10^{100}": ["10^{100}+1", "10^{101}", "10^{99}"],
    r"10^{40}\sqrt2": [r"10^{40}\sqrt2+1", r"10^{40}\sqrt3"],
    r"\pi": [r"\frac{22}{7}", r"\frac{355}{113}", "3.1416", r"\pi+10^{-30}"],
    "0.00001": ["0.00002", "0.0000101", "10^{-6}", "0"],
    "16386.17": ["16386.169", "16386.2", "16386", "16,386.16"],
    r"\frac{1}{3}": ["0.33", "0.3333", "0.334", r"0.\overline{34}", "3"],
    "1,22": ["1.22", "122", "22", "1,2"],
    "x>2": ["y>2", "x<2", "x≥2", "2"],
    r"0 \le x < 3": [r"0 \le y < 3", r"0 < x < 3", r"[0,3]"],
    "17": [r"17 \bmod 5", "17!", "1.7e2"],
    "x^2+1": ["x²-1", "x2+1", "x³+1", "2x+1"],
    r"\sin^2 x": [r"1+\cos^2 x", r"\sin x^2", r"\sin 2x", r"\cos^2 x"],
    "2 \\pmod 5": [r"2 \pmod 7", r"3 \pmod 5", "5"],
    r"1 - \frac{1}{\mathrm{e}}": [r"1 + \frac{1}{\mathrm{e}}", r"1-e", "1"],
    "f(x)": ["f(y)", "g(x)"],
    r"\log_2 x": [r"\log_3 x", r"\ln x", r"2\log x"],
    r"\binom{5}{2}": [r"\binom{5}{4}", r"\binom{2}{5}", "20"],
    "2^{10}": ["1023", "1025", "20", "10^2", "100"],
    r"\frac{x+2}{7}": [r"\frac{x}{7}+2", r"\frac{x-2}{7}", r"x+\frac{2}{7}"],
    "28\\%": ["2.8\\%", "0.28\\%", "82\\%"],
    "90^\\circ": ["91^\\circ", "90\\pi", "9^\\circ"],
}


def test_near_misses_stay_wrong(grader: Grader) -> None:
    stated = [(gold, text) for gold, texts in NEAR_MISSES_STATED.items() for text in texts]
    boxed = [
        (gold, f"Thus $\\boxed{{{form}}}$.")
        for gold, forms in NEAR_MISSES_BOXED.items()
        for form in forms
    ]
    assert len(stated) + len(boxed) >= 200
    assert _not_as_wanted(grader, stated + boxed, correct=False) == []


def test_math_verifys_pairs_are_decided_as_there_or_with_a_reason(grader: Grader) -> None:
    assert len(PAIRS) == 269
    right = [(p["gold"], p["response"]) for p in PAIRS if p["theirs"] != ("why" in p)]
    wrong = [(p["gold"], p["response"]) for p in PAIRS if p["theirs"] == ("why" in p)]
    assert _not_as_wanted(grader, right, correct=True) == []
    assert _not_as_wanted(grader, wrong, correct=False) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{(2, 2)}$ and $\boxed{(6, 2)}$", "(2, 2), (6, 2)"),
        (r"\boxed{1},\boxed{2},\boxed{3}", "1, 2, 3"),
        (r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        (r"$y_1 = \boxed{a}$ and $y_2 = \boxed{b}$", "a, b"),
        (r"\[\boxed{x}\] \[\boxed{y}\]", "x, y"),
        (r"\boxed{5} \text{ for part (a) and } \boxed{6}", "5, 6"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{5}. Thus \boxed{6}", "6"),
        (r"\boxed{5} is wrong and \boxed{6}", "6"),
        (r"\boxed{5} or rather \boxed{6}", "6"),
        (r"\boxed{5} no no no no \boxed{6}", "6"),
        (r"\boxed{5} } \boxed{6}", "6"),
        (r"\boxed{5} and \boxed{ }", "5"),
        (r"\boxed{} \boxed{}", ""),
        ("none", None),
    ],
)
def test_boxes_that_are_one_list_are_one_answer(text: str, answer: str | None) -> None:
    assert find_boxes(text) == (answer, False)


def test_several_boxes_are_compared_as_a_list(grader: Grader) -> None:
    right = [
        ("(2, 2), (6, 2)", r"$\boxed{(2, 2)}$ and $\boxed{(6, 2)}$"),
        (r"\{1,2,3\}", r"\boxed{1},\boxed{2},\boxed{3}"),
        (r"$n = \boxed{1,-2}$", r"$x = \boxed{-2}$ and $\boxed{1}$"),
        (r"\boxed{1} and \boxed{2}", r"\boxed{2, 1}"),
        ("0.5", r"\boxed{\frac{1}{2}} or \boxed{0.5}"),
        ("5", r"The answer is $\boxed{5}$ and \boxed{ }."),
    ]
    wrong = [
        ("6", r"\boxed{5} or \boxed{6}"),
        (r"\text{(A)}", r"\boxed{A} or \boxed{B}"),
        (r"\text{(A)}", r"\boxed{\text{(A)}}, \boxed{\text{(B)}}"),
        ("1, 2, 3", r"\boxed{1}. Hence \boxed{2, 3}"),
    ]
    assert _not_as_wanted(grader, right, correct=True) == []
    assert _not_as_wanted(grader, wrong, correct=False) == []


@pytest.mark.parametrize("truncated", [False, True])
def test_a_box_left_open_withdraws_the_one_before(truncated: bool) -> None:
    result = grade(r"It is \boxed{7}. No, \boxed{8", "7", truncated=truncated)
    assert result.status == ("truncated" if truncated else "unparsed")
    assert not result.correct
    assert find_boxes(r"\boxed{7} and \boxed{8") == ("7", True)


@pytest.mark.parametrize(
    "tags",
    [
        ThinkingTags(),
        ThinkingTags("[THINK]", "[/THINK]"),
        ThinkingTags("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ],
)
def test_a_thinking_that_is_cut_off_is_no_answer_in_any_format(tags: ThinkingTags) -> None:
    cut_off = [
        f"{tags.open}it is \\boxed{{7}}",
        f"Let me see. {tags.open}it is \\boxed{{7}}",
        f"{tags.open}one{tags.close}Wait.{tags.open}it is \\boxed{{7}}",
    ]
    for response in cut_off:
        assert grade(response, "7", tags=tags).status == "no_answer"
        assert grade(response, "7", tags=tags, truncated=True).status == "truncated"
    assert grade(f"{tags.open}8{tags.close}{tags.open}9{tags.close}7", "7", tags=tags).correct
