"""What `dial.py` weighs: the answers of every kind of setting, and the adapters that are trained first."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

QUESTION_SEED = 20_000
"""Of the questions that all settings answer."""

LIMIT = 500
"""Tokens; one slow answer in some thousands is longer. Mixtures that lose themselves end here."""

CONCISE_LAMBDAS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
SOFT_ENDS = {"fast": 1.0, "concise": 1.5, "pair": 5.0}
CONCISE = {
    "sft": {"steps": 900, "learning_rate": 2e-3},
    "trra": {"steps": 900, "learning_rate": 2e-3},
}

EXIT_MARKER = ";"
"""Ends a part of the thinking for exits: it is the end of a line in the miniature."""

Found = dict[str, Any]
"""A setting's name, its ``answers``, and the ``traces`` and ``confidence`` that others need."""


def train_concise(method: str, folder: Path, options: dict[str, Any]) -> None:
    """Train an adapter towards the aligned model, unless its folder is there already."""
    import torch

    from flexalign.miniature import ALIGNED
    from flexalign.miniature import folder as part
    from flexalign.miniature.build import Schooling, make_adapter, teach
    from flexalign.miniature.demo import load_pair

    if (folder / "inra_config.json").is_file():
        return
    torch.set_num_threads(1)
    adapter = make_adapter(part("reference"))
    recipe = {**CONCISE[method], **({"steps": 100} if options["quick"] else {})}
    if method == "sft":
        teach(adapter.stream, Schooling(ALIGNED, batch_size=24, **recipe), seed=0, callbacks=[])
    else:
        from _adapters import dial_logits, plain_logits, towards

        reference, aligned, _ = load_pair()
        student = dial_logits(adapter.model, 1.0)
        parameters = list(adapter.model.adapter.parameters())
        towards(student, parameters, plain_logits(reference), plain_logits(aligned), **recipe)
    adapter.save(folder)


def branch_table(method: str, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Habits at each λ, teacher-forced, beside the form of the adapter's own measured ends."""
    import torch
    from _adapters import dial_logits, walked

    from flexalign.inra import InRaModel
    from flexalign.miniature import make_questions
    from flexalign.miniature.build import CONTEXT_TOKENS
    from flexalign.miniature.closed_form import expected_outcome, token_level
    from flexalign.miniature.measure import branch_probabilities, mean_habits
    from flexalign.miniature.tokenizer import build_tokenizer

    torch.set_num_threads(1)
    model = InRaModel.from_pretrained("miniature:reference", folder)
    questions = make_questions(options["judged_questions"], QUESTION_SEED)
    values = branch_probabilities(
        {f"{lam:g}": dial_logits(model, lam) for lam in CONCISE_LAMBDAS},
        build_tokenizer(CONTEXT_TOKENS),
        questions,
        walked(questions),
    )
    habits = {name: mean_habits(found) for name, found in values.items()}
    rows = []
    for name, measured in habits.items():
        form = token_level(habits["0"], habits["1"], float(name))
        rows.append(
            {
                "method": method,
                "lambda": float(name),
                "habits": asdict(measured),
                "form": asdict(form),
                "form_outcome": asdict(expected_outcome(form)),
            }
        )
    return rows


def answer_fast(lam: float | None, options: dict[str, Any], seed: int) -> Found:
    """Let the fast adapter's dial answer at λ, or greedily at λ = 1 with its confidence (None)."""
    from flexalign.miniature.demo import confidences

    model, tokenizer, questions = _dial("miniature:fast", options, seed)
    if lam is not None:
        return _answered("mixed dial", f"λ={lam:g}", model, tokenizer, questions, lam=lam)
    found = _answered(
        "fast, greedy", "greedy", model, tokenizer, questions, lam=1.0, temperature=0.0
    )
    return {**found, "confidence": confidences(model, tokenizer, questions, found["traces"])}


def answer_concise(method: str, folder: Path, lam: float, options: dict[str, Any]) -> Found:
    model, tokenizer, questions = _dial(folder, options, QUESTION_SEED)
    system = f"concise dial, {method}"
    return _answered(system, f"λ={lam:g}", model, tokenizer, questions, lam=lam)


def answer_soft(where: str, budget: int, work: Path, options: dict[str, Any]) -> Found:
    """A soft budget: λ rises from 0 over the budget's tokens of thinking, and stays there.

    Args:
        where: What the λ belongs to: the fast adapter, the concise one, or the pair.
        budget: In tokens.
        work: Holds the concise adapter.
        options: Of the run.
    """
    from flexalign import ModelPair, TwoModelDecoder

    if where == "pair":
        model: Any = TwoModelDecoder(ModelPair.load("miniature:reference", "miniature:aligned"))
        _, tokenizer, questions = _dial("miniature:fast", options, QUESTION_SEED)
    else:
        adapter = "miniature:fast" if where == "fast" else work / "sft"
        model, tokenizer, questions = _dial(adapter, options, QUESTION_SEED)
    end = SOFT_ENDS[where]
    answer = 0.0 if where == "fast" else 1.0  # the fast stream knows no answers to thinking
    schedule = {"kind": "thinking", "think": 0.0, "answer": answer, "budget": budget, "end": end}
    name = f"N={budget}, end {end:g}"
    return _answered(f"soft budget, {where}", name, model, tokenizer, questions, lam=schedule)


def answer_hard(budget: int, options: dict[str, Any]) -> Found:
    """A hard budget: the slow mode's thinking, closed after so many tokens."""
    from flexalign.data import LogitsSettings

    model, tokenizer, questions = _dial("miniature:fast", options, QUESTION_SEED)
    limits = LogitsSettings(thinking_budget=budget)
    name = f"N={budget}"
    return _answered("hard cut", name, model, tokenizer, questions, lam=0.0, logits=limits)


def answer_exit(where: str, threshold: float, options: dict[str, Any]) -> Found:
    """Close the thinking at the first end of a line whose trial answer is confident enough.

    Args:
        where: Whose trial answers: the fast adapter's, the aligned model's of the pair, or those of
            the reference itself (one stream).
        threshold: The least confidence.
        options: Of the run.
    """
    import numpy as np

    from flexalign import Exit, ModelPair, TwoModelDecoder
    from flexalign.generation.responses import generate_responses
    from flexalign.miniature.demo import JudgedAnswers, judge, load_pair

    model, tokenizer, questions = _dial("miniature:fast", options, QUESTION_SEED)
    if where == "pair":
        model = TwoModelDecoder(ModelPair.load("miniature:reference", "miniature:aligned"))
    elif where == "one stream":
        model = load_pair()[0]
    responses = generate_responses(
        model,
        tokenizer,
        [[{"role": "user", "content": question.text}] for question in questions],
        max_new_tokens=LIMIT,
        temperature=1.0,
        batch_size=128,
        seed=1,
        policy=Exit(threshold, marker=EXIT_MARKER),
    )
    traces = [response.text.split() for response in responses]
    # Rejected trial answers are counted.
    tokens = np.array([response.tokens for response in responses])
    answers = JudgedAnswers(judge(questions, traces).right, tokens)
    setting = f"τ={threshold:g}"
    return {"system": f"exit, {where}", "setting": setting, "answers": answers, "traces": traces}


def answer_pair(kind: str, lam: float, options: dict[str, Any]) -> Found:
    """The pair by other ways: equation 5 over two models, between weights, or TrRa's student."""
    import torch

    from flexalign import ModelPair, TwoModelDecoder, interpolate
    from flexalign.miniature.demo import Training, load_pair, realign
    from flexalign.models.loading import load_model

    torch.set_num_threads(1)
    _, aligned, tokenizer = load_pair()
    questions = questions_of(options, QUESTION_SEED)
    name = f"λ={lam:g}"
    if kind == "two models":
        pair = ModelPair.load("miniature:reference", "miniature:aligned")
        return _answered(kind, name, TwoModelDecoder(pair), tokenizer, questions, lam=lam)
    with TemporaryDirectory() as scratch:
        if kind == "weights":
            output = Path(scratch) / "between"
            model = load_model(interpolate("miniature:reference", "miniature:aligned", lam, output))
        else:
            training = Training(steps=20 if options["quick"] else 150)
            model = realign(aligned, lam, Path(scratch), training)
    return _answered(kind, name, model, tokenizer, questions)


def questions_of(options: dict[str, Any], seed: int) -> list[Any]:
    """The questions of a seed, as many as the run asks."""
    from flexalign.miniature import make_questions

    return make_questions(options["questions"], seed)


def _dial(adapter: Any, options: dict[str, Any], seed: int) -> tuple[Any, Any, list[Any]]:
    import torch

    from flexalign.inra import InRaModel
    from flexalign.miniature import folder
    from flexalign.models.loading import load_tokenizer

    torch.set_num_threads(1)
    path = folder("fast") if adapter == "miniature:fast" else adapter
    model = InRaModel.from_pretrained("miniature:reference", path)
    model._has_warned = True
    return model, load_tokenizer("miniature:reference"), questions_of(options, seed)


def _answered(
    system: str, setting: str, model: Any, tokenizer: Any, questions: list[Any], **options: Any
) -> Found:
    from flexalign.miniature.demo import judge, respond

    traces = respond(
        model,
        tokenizer,
        questions,
        seed=1,
        batch_size=64,
        max_new_tokens=LIMIT,
        **options,
    )
    answers = judge(questions, traces)
    return {"system": system, "setting": setting, "answers": answers, "traces": traces}
