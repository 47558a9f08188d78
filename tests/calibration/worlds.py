"""Settings of known effect, to be asked."""

from collections.abc import Sequence

import numpy as np

from flexalign.calibration import Ask
from flexalign.evaluation.samples import Samples

QUESTIONS = [f"q{number}" for number in range(200)]


def make_ask(
    effects: dict[str, float],
    cuts: dict[str, float],
    seed: int = 0,
    accuracy: float = 0.75,
    questions: Sequence[str] = QUESTIONS,
) -> Ask:
    """An `ask` whose settings' true accuracy is `accuracy` plus their effect, on average."""
    generator = np.random.default_rng(seed)
    base = generator.beta(0.7 * accuracy, 0.7 * (1 - accuracy), len(questions))
    of_question = dict(zip(questions, base, strict=True))

    def ask(setting: str, asked: Sequence[str], samples: int) -> Samples:
        rates = np.array([of_question[question] for question in asked])
        rates = np.clip(rates * (1 + effects[setting] / accuracy), 0, 1)
        shape = (len(asked), samples)
        tokens = 1000 * (1 - cuts[setting]) * generator.lognormal(0, 0.4, shape)
        return Samples.from_table(generator.random(shape) < rates[:, None], tokens, asked)

    return ask
