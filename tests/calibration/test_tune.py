import math
from collections import Counter

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from calibration.worlds import QUESTIONS, make_ask
from flexalign.calibration import NonInferiority, TokenBudget, TuneOptions, select_setting
from flexalign.calibration.race import steadied_deviation
from flexalign.calibration.tune import default_candidates
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.samples import Samples
from flexalign.systems import System

SETTINGS = ["λ=0.5", "λ=1", "λ=2"]
CUTS = {"λ=0": 0.0, "λ=0.5": 0.2, "λ=1": 0.4, "λ=2": 0.6}
QUICK = TuneOptions(samples=4)


def _effects(*values: float) -> dict[str, float]:
    return dict(zip(CUTS, (0.0, *values), strict=True))


def test_the_boldest_that_keeps_the_promise_is_chosen():
    ask = make_ask(_effects(0.0, 0.0, -0.4), CUTS)
    tuned = select_setting(SETTINGS, ask, QUESTIONS, NonInferiority(0.15), options=QUICK)
    assert tuned.chosen == "λ=1"
    assert tuned.at_proof["λ=1"].token_cut == pytest.approx(0.4, abs=0.05)
    assert tuned.samples < 0.5 * tuned.exhaustive == 0.5 * 4 * 4 * 200


def test_none_is_an_answer():
    ask = make_ask(_effects(-0.3, -0.4, -0.5), CUTS)
    tuned = select_setting(SETTINGS, ask, QUESTIONS, NonInferiority(0.05), options=QUICK)
    assert tuned.chosen is None
    assert tuned.proofs == ()
    assert "none of the candidates" in tuned.reason


def test_a_setting_that_saves_nothing_is_not_chosen():
    ask = make_ask(_effects(0.0, 0.0, 0.0), dict.fromkeys(CUTS, 0.0) | {"λ=2": -0.5})
    tuned = select_setting(["λ=2"], ask, QUESTIONS, NonInferiority(0.1), options=QUICK)
    assert tuned.chosen is None


def test_the_most_accurate_within_the_budget_is_chosen():
    ask = make_ask(_effects(-0.05, -0.2, -0.5), CUTS)
    budget = 1000 * math.exp(0.08) * 0.7  # the mean of the world's lengths, less three tenths
    tuned = select_setting(SETTINGS, ask, QUESTIONS, TokenBudget(budget), options=QUICK)
    assert tuned.chosen == "λ=1"
    assert tuned.candidates[0] == "λ=0"


def test_no_bet_is_made_on_tokens():
    ask = make_ask(_effects(0, 0, 0), CUTS)
    options = TuneOptions(looks="betting")
    with pytest.raises(ConfigError, match="betting needs a loss that is bounded"):
        select_setting(SETTINGS, ask, QUESTIONS, TokenBudget(500), options=options)


def test_choosing_and_proof_share_no_question_and_none_is_asked_twice():
    asked: Counter[tuple[str, str]] = Counter()
    inner = make_ask(_effects(0.0, -0.02, -0.05), CUTS)

    def ask(setting: str, questions: list[str], samples: int) -> Samples:
        asked.update((setting, question) for question in questions)
        return inner(setting, questions, samples)

    tuned = select_setting(SETTINGS, ask, QUESTIONS, NonInferiority(0.05), options=QUICK)
    assert set(asked.values()) == {1}
    assert not set(tuned.race.questions) & set(tuned.held_out)
    assert set(tuned.race.questions) | set(tuned.held_out) == set(QUESTIONS)
    assert tuned.samples == 4 * len(asked)


@pytest.mark.parametrize("looks", ["obrien-fleming", "pocock", "betting"])
def test_every_way_of_looking_finds_what_is_plain(looks):
    ask = make_ask(_effects(0.0, 0.0, -0.4), CUTS)
    options = TuneOptions(samples=4, looks=looks)
    tuned = select_setting(SETTINGS, ask, QUESTIONS, NonInferiority(0.15), options=options)
    assert tuned.chosen == "λ=1"


def test_the_same_seed_gives_the_same_answer():
    runs = [
        select_setting(
            SETTINGS,
            make_ask(_effects(0, 0, -0.1), CUTS),
            QUESTIONS,
            NonInferiority(0.05),
            options=QUICK,
        )
        for _ in range(2)
    ]
    assert runs[0].to_json() == runs[1].to_json()


def test_promises_are_seldom_broken_where_all_settings_are_on_the_edge():
    repetitions, margin = 300, 0.06
    broken = 0
    for seed in range(repetitions):
        ask = make_ask(_effects(-margin, -margin, -margin), CUTS, seed)
        options = TuneOptions(samples=4, seed=seed)
        tuned = select_setting(SETTINGS, ask, QUESTIONS, NonInferiority(margin), options=options)
        broken += tuned.chosen is not None
    assert broken / repetitions <= 0.05 + 3.09 * math.sqrt(0.05 * 0.95 / repetitions)


def test_agreement_on_a_few_questions_is_not_certainty():
    assert steadied_deviation(np.zeros(10), 1.0) == pytest.approx(math.sqrt(0.25 / 9))


@pytest.mark.parametrize(
    ("candidates", "questions", "message"),
    [
        ([], QUESTIONS, "no candidate"),
        (["λ=1", "λ=1"], QUESTIONS, "given twice"),
        (["λ=0"], QUESTIONS, "given twice"),
        (["λ=1"], QUESTIONS[:19], "at least 20"),
        (["λ=1"], QUESTIONS[:10] * 2, "at least 20"),
    ],
)
def test_wrong_input_is_said_before_anything_is_asked(candidates, questions, message):
    def ask(*_: object) -> Samples:
        raise AssertionError("asked")

    with pytest.raises(ConfigError, match=message):
        select_setting(candidates, ask, questions, NonInferiority(0.02))


def test_answers_of_another_shape_are_refused():
    def ask(setting: str, questions: list[str], samples: int) -> Samples:
        return Samples.from_table(np.ones((1, 1), bool), np.ones((1, 1)))

    with pytest.raises(DataError, match="got outcomes of shape"):
        select_setting(["λ=1"], ask, QUESTIONS, NonInferiority(0.02))


@pytest.mark.parametrize(
    "options",
    [
        {"confidence": 0.3},
        {"choosing_share": 1.0},
        {"samples": 0},
        {"finalists": 0},
        {"looks": "sometimes"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        TuneOptions(**options)


@pytest.mark.parametrize("goal", [lambda: NonInferiority(0.0), lambda: TokenBudget(-1)])
def test_goals_out_of_range_are_refused(goal):
    with pytest.raises(ConfigError):
        goal()


def test_outcomes_of_two_shapes_are_refused():
    with pytest.raises(DataError, match="one shape"):
        Samples.from_table(np.ones((2, 2), bool), np.ones((2, 3)))


@pytest.mark.parametrize(
    ("kind", "adapter", "permitted", "expected"),
    [
        ("dial", "fast", None, (0.25, 0.5, 0.75, 1.0)),
        ("dial", "dial", None, (1.25, 2.5, 3.75, 5.0)),
        ("dial", "dial", (-1.0, 3.0), (-1.0, 1.0, 2.0, 3.0)),
        ("dial", "dial", (0.0, 0.3), (0.075, 0.15, 0.225, 0.3)),
        ("pair", "aligned", None, (0.25, 0.5, 0.75, 1.0)),
    ],
)
def test_the_candidates_of_a_dial_are_of_its_own_range(kind, adapter, permitted, expected):
    system = System(kind, kind, ("miniature", f"miniature:{adapter}"))
    assert default_candidates(system, permitted) == expected


def test_a_lora_of_two_settings_has_one_candidate(tiny_pair, tiny_model, tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    system = System("lora", "dial", (str(tiny_pair.reference), str(tmp_path)))
    assert default_candidates(system) == (1.0,)
