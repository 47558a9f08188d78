"""Proof of the grader on the public files: golds, rewritings, wrong answers, hostile ones.

    python benchmarks/grading.py --data FOLDER     # or with FLEXALIGN_DATA

Every known answer of MATH-500, AIME and AMC against itself, boxed and in five sentences without a
box, and 40 of MATH-500 in ten equivalent forms each, must be right; 200 perturbed answers must be
wrong, in a box and without one; answers made to hang or crash a
grader may cost their limit of time and nothing else.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flexalign.evaluation.grading import Answered, Grader
from flexalign.evaluation.tasks import DATA_VARIABLE, load_task

REPORT = Path("benchmarks/results/grading.md")
TASKS = ("math500", "aime", "amc")
REWRITTEN, FORMS, WRONG = 40, 10, 200
SECONDS = 3.0
HOSTILE = {
    "a power tower": "9^{9^{9^9}}",
    "20 000 brackets": "(" * 20_000,
    "20 000 closed brackets": "(" * 20_000 + "1" + ")" * 20_000,
    "20 000 braces": "{" * 20_000 + "1" + "}" * 20_000,
    "20 000 roots": "\\sqrt{" * 20_000 + "2" + "}" * 20_000,
    "a factorial": "99999999!!!",
}

STATED = (
    "The answer is ${}$.",
    "The answer is {}",
    "**Answer:** {}",
    "The final answer is \\({}\\), as $x > 3$.",
    "First.\n\n\\[ x = 3 \\]\n\nThus\n\\[ {} \\]",
)

_UNITS = re.compile(r"(?:\^\\circ|\\(?:text|mbox)\{ *(?:cm|inches|cents|degrees) *\}(?:\^2)?)$")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.+)\\end\{pmatrix\}")
_TUPLE = re.compile(r"(?:\\left)?([(\[])(.+?)(?:\\right)?([)\]])")


def rewritings(gold: str) -> list[str]:
    """Forms of an answer that mean the same; empty where none are known."""
    if word := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold):
        return _words(word[1])
    if based := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        return _dressed([f"{based[1]}_{based[2]}", f"{based[1]}_{{{based[2]}}}", based[1]])
    if matrix := _MATRIX.fullmatch(gold):
        return _matrices(matrix[1].strip())
    if unit := _UNITS.search(gold):
        return _dressed([gold[: unit.start()].strip(), *_scalars(gold[: unit.start()].strip())])
    if "=" in gold or "\\in" in gold or "\\pm" in gold or "\\cup" in gold or "\\{" in gold:
        return _dressed([gold])
    if (pair := _TUPLE.fullmatch(gold)) and "," in gold:
        return _tuples(pair[1], [part.strip() for part in pair[2].split(",")], pair[3])
    plain = gold.replace("\\!", "").replace("\\$", "").replace(", ", ",")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", plain):
        return _dressed([plain, *_scalars(plain.replace(",", ""))])
    if "," in plain:
        return _lists([part.strip() for part in gold.split(",")])
    return _dressed(_scalars(plain))


def perturbations(gold: str) -> list[str]:
    """Answers that look alike and are wrong."""
    if word := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold):
        return [f"\\text{{{word[1][::-1]}x}}", "\\text{none}"]
    if based := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        return [f"{based[1]}_{int(based[2]) + 1}", f"{int(based[1]) + 1}_{based[2]}"]
    if matrix := _MATRIX.fullmatch(gold):
        return [f"\\begin{{pmatrix}}1 + {matrix[1].strip()}\\end{{pmatrix}}"]
    if (pair := _TUPLE.fullmatch(gold)) and "," in gold and "\\cup" not in gold:
        first, *rest = pair[2].split(",")
        if "infty" in first:
            return [f"{pair[1]}{first},{','.join(rest)}+1{pair[3]}"]
        moved = f"{pair[1]}{first}+1,{','.join(rest)}{pair[3]}"
        swapped = {"(": "[", "[": "("}[pair[1]]
        return [moved, f"{swapped}{pair[2]}{pair[3]}"] if len(rest) == 1 else [moved]
    if "=" in gold or "\\in" in gold or "\\cup" in gold or "\\{" in gold:
        return []
    plain = gold.replace("\\!", "").replace("\\$", "").replace(", ", ",")
    if unit := _UNITS.search(plain):
        plain = plain[: unit.start()].strip()
    if "," in plain and not re.fullmatch(r"-?\d{1,3}(,\d{3})+", plain):
        first, *rest = plain.split(",")
        return [f"{first}+1,{','.join(rest)}", ",".join(rest)]
    plain = plain.replace(",", "")
    negated = [] if plain == "0" or "\\pm" in plain else [f"-\\left({plain}\\right)"]
    return [f"{plain}+1", *negated, f"{plain}+\\frac{{1}}{{100}}"]


def _scalars(text: str) -> list[str]:
    group = f"\\left({text}\\right)"
    forms = [
        text.replace("\\frac", "\\dfrac"),
        text.replace("\\dfrac", "\\frac").replace("\\frac", "\\tfrac"),
        group,
        f"\\frac{{2{group}}}{{2}}",
        f"-\\left(-{group}\\right)",
        f"1 \\cdot {group}",
        f"{group} + 0",
        f"{group} - 1 + 1",
        re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text).replace("\\sqrt{", "\\sqrt {"),
    ]
    if fraction := re.fullmatch(r"(-?)\\d?frac ?\{?(\d+?)\}? ?\{?(\d+)\}?", text):
        sign, over, under = fraction[1], int(fraction[2]), int(fraction[3])
        forms += [
            f"{sign}{over}/{under}",
            f"{sign}\\frac{{{3 * over}}}{{{3 * under}}}",
            f"\\frac{{{sign}{over}}}{{{under}}}",
            f"{sign}{over} \\div {under}",
        ]
    if re.fullmatch(r"-?\d+", text):
        forms += [f"{text}.0", f"{int(text):,}", f"x = {text}", f"\\frac{{{int(text) * 3}}}{{3}}"]
    return forms


def _words(word: str) -> list[str]:
    dress = ("{}", "\\text{{{}}}", "\\text{{ {} }}", "\\mathrm{{{}}}", "\\textbf{{{}}}")
    return _dressed([form.format(word) for form in dress])


def _matrices(body: str) -> list[str]:
    dense = re.sub(r"\s*(&|\\\\)\s*", r"\1", body)
    return _dressed(
        [
            f"\\begin{{{kind}}}{inside}\\end{{{kind}}}"
            for kind in ("pmatrix", "bmatrix")
            for inside in (body, dense, re.sub(r"(-?)(\d+)/(\d+)", r"\1\\frac{\2}{\3}", body))
        ]
    )


def _tuples(left: str, parts: list[str], right: str) -> list[str]:
    forms = [f"\\left{left}{', '.join(parts)}\\right{right}", f"{left}{','.join(parts)}{right}"]
    for rewritten in zip(*[_scalars(p)[:8] for p in parts if "infty" not in p], strict=True):
        turn = iter(rewritten)
        inside = ", ".join(p if "infty" in p else next(turn) for p in parts)
        forms.append(f"\\left{left} {inside} \\right{right}")
    return _dressed(forms)


def _lists(parts: list[str]) -> list[str]:
    orders = [parts, parts[::-1], parts[1:] + parts[:1]]
    forms = [", ".join(order) for order in orders]
    return _dressed([*forms, *(f"\\{{{form}\\}}" for form in forms), ",".join(parts)])


def _dressed(forms: list[str]) -> list[str]:
    """Ten different forms: the given ones, then the same in other dress."""
    dress = ("{}", "{}.", " {} ", "\\displaystyle {}", "${}$", "{}\\,")
    every = dict.fromkeys(pattern.format(form) for pattern in dress for form in forms)
    return list(every)[:FORMS]


def _grade(
    grader: Grader, pairs: Sequence[tuple[str, str]], sentence: str = "\\boxed{{{}}}"
) -> list[str]:
    items = [Answered(f"<think>So</think>{sentence.format(form)}", gold) for form, gold in pairs]
    return [grade.status for grade in grader.grade_many(items)]


def _check(
    grader: Grader,
    name: str,
    pairs: Sequence[tuple[str, str]],
    wanted: str,
    sentences: Sequence[str] = ("\\boxed{{{}}}",),
) -> tuple[str, bool]:
    failed = [
        f"{sentence.format(form)!r} for {gold!r}: {status}"
        for sentence in sentences
        for (form, gold), status in zip(pairs, _grade(grader, pairs, sentence), strict=True)
        if status != wanted
    ]
    number = len(pairs) * len(sentences)
    for line in failed:
        print(f"  {name}: {line}", file=sys.stderr)
    return f"| {name} | {number} | {number - len(failed)} {wanted} |", not failed


def _hostile(grader: Grader) -> list[tuple[str, bool]]:
    rows = []
    for name, answer in HOSTILE.items():
        start = time.perf_counter()
        status, after = _grade(grader, [(answer, "\\frac{1}{2}"), ("0.5", "\\frac{1}{2}")])
        seconds = time.perf_counter() - start
        fine = (status, after) == ("unparsed", "correct") and seconds < SECONDS + 5
        rows.append((f"| {name} | 1 | {status} after {seconds:.1f} s |", fine))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get(DATA_VARIABLE))
    chosen = parser.parse_args(arguments)
    if not chosen.data:
        print(f"grading: skipped, as neither --data nor {DATA_VARIABLE} names the public files")
        return
    golds = {name: [q.gold for q in load_task(name, data=chosen.data).questions] for name in TASKS}
    hard = sorted({gold for gold in golds["math500"] if not gold.lstrip("-").isdigit()})
    rich = [gold for gold in hard if len(rewritings(gold)) == FORMS]
    picked = [rich[index * len(rich) // REWRITTEN] for index in range(REWRITTEN)]
    wrong = [
        (form, gold)
        for gold in dict.fromkeys([*hard, *golds["amc"]])
        for form in perturbations(gold)
    ]
    wrong = [wrong[index * len(wrong) // WRONG] for index in range(WRONG)]
    with Grader(workers=2, seconds=SECONDS) as grader:
        rows = [
            _check(grader, f"{name}, each gold against itself", [(g, g) for g in its], "correct")
            for name, its in golds.items()
        ]
        forms = [(form, gold) for gold in picked for form in rewritings(gold)]
        rows.append(_check(grader, f"{REWRITTEN} golds, {FORMS} forms each", forms, "correct"))
        stated = [(gold, gold) for its in golds.values() for gold in its]
        name = f"each gold in {len(STATED)} sentences without a box"
        rows.append(_check(grader, name, stated, "correct", STATED))
        rows.append(_check(grader, "perturbed", wrong, "wrong"))
        rows.append(_check(grader, "perturbed, without a box", wrong, "wrong", STATED[:1]))
        rows += _hostile(grader)
    table = [
        "# The grader on the public files\n",
        f"`python benchmarks/grading.py`: limit {SECONDS:g} s for each comparison.\n",
        "| answers | number | result |",
        "|---|---|---|",
        *(line for line, _ in rows),
    ]
    REPORT.write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    if not all(fine for _, fine in rows):
        sys.exit("grading: some answers were graded otherwise than they must; see above")


if __name__ == "__main__":
    main()
