"""Makes an aligned model of the miniature's reference, by one of the methods that make such pairs.

*SFT*: supervised training on traces with the habits `ALIGNED`, as for the aligned model that ships.

*GRPO*: reinforcement learning. To each question the model samples a group of responses, and it
learns to give more probability to those whose reward is above the group's mean (Shao et al. 2024,
arXiv 2402.03300, by TRL). The reward of a response is 1 if it is right and 0 if not, less a cost for
each of its tokens. Two other rewards are controls, which say nothing about the response: a
*constant* one, and a *random* one, 0 or 1 by a coin.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from flexalign._storage import replacing, write_json, write_text
from flexalign.errors import ConfigError
from flexalign.miniature import folder, make_questions
from flexalign.miniature.build import (
    ALIGNED_SCHOOLING,
    Schooling,
    save_part,
    show_progress_alone,
    teach,
)
from flexalign.miniature.demo import respond
from flexalign.miniature.measure import branch_probabilities, is_right, split_trace
from flexalign.miniature.world import Question
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.statistics import Interval, clustered_interval, paired_difference_interval
from flexalign.training.card import table
from flexalign.training.output import is_unused

RewardName: TypeAlias = Literal["right", "constant", "random"]

METHODS = ("grpo", "sft")
REWARDS: tuple[RewardName, ...] = get_args(RewardName)

RECORD = "alignment.json"
"""The file in the model's folder that has the options and the measurements."""

_TRAINING_SEED = 30_000
_QUESTION_SEED = 20_000
"""Of the questions that are measured: those of the task ``miniature``."""

_SYMBOLS = {"again": "r", "check": "c", "error": "ε", "catch": "q", "quit": "quit"}


@dataclass(frozen=True)
class Reinforcement:
    """Options of a training with GRPO.

    Attributes:
        cost: What each token of a response costs; a right answer is worth 1.
        steps: Optimizer steps of `groups` questions.
        reward: ``right``, or a control: ``constant`` or ``random``, which know no cost.
        learning_rate: Of all steps.
        groups: Questions in each step.
        group_size: Responses to each question.
        longest: Tokens of a response at most. One that is cut off is not right.
    """

    cost: float = 0.01
    steps: int = 22
    reward: RewardName = "right"
    learning_rate: float = 4e-4
    groups: int = 8
    group_size: int = 8
    longest: int = 256


def alignment_options(
    method: str, cost: float | None, steps: int | None, reward: str | None
) -> Schooling | Reinforcement:
    """Return the options of a method; None is the method's own value.

    Raises:
        ConfigError: If a value is unknown or out of range, or the method has no such option.
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method!r} is not known; take {' or '.join(METHODS)}.")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps must be a whole number ≥ 1, got {steps}.")
    if method == "sft":
        for name, value in (("--cost", cost), ("--reward", reward)):
            if value is not None:
                raise ConfigError(f"{name} is of --method grpo; sft learns from traces.")
        return replace(ALIGNED_SCHOOLING, steps=steps or ALIGNED_SCHOOLING.steps)

    if reward is not None and reward not in REWARDS:
        raise ConfigError(f"--reward {reward!r} is not known; take {', '.join(REWARDS)}.")
    if cost is not None and reward not in (None, "right"):
        raise ConfigError(f"--cost with --reward {reward}: that reward has no cost; leave it out.")
    if cost is not None and not (math.isfinite(cost) and cost >= 0):
        raise ConfigError(f"--cost must be a number ≥ 0, got {cost}.")
    own = Reinforcement()
    chosen: RewardName = next((name for name in REWARDS if name == reward), own.reward)
    if chosen != "right":
        cost = 0.0
    elif cost is None:
        cost = own.cost
    return replace(own, cost=cost, steps=steps or own.steps, reward=chosen)


def align(
    output: Path, options: Schooling | Reinforcement, *, seed: int = 0, questions: int = 1000
) -> dict[str, Any]:
    """Train the reference, write the aligned model's folder, and return its measurements.

    The folder is a transformers model with a card (``README.md``) and the file `RECORD`, whose
    content is returned: ``method``, ``seed``, ``options``, ``questions``, and for ``reference`` and
    ``aligned`` the intervals ``accuracy``, ``tokens`` and ``habits`` (low, mean, high), which are
    measured on the same questions; ``change`` has the paired intervals of accuracy and tokens.

    Args:
        output: The folder; it must be new or empty.
        options: Of SFT or of GRPO.
        seed: Of the training's data and of all sampling.
        questions: Number of questions that are measured.

    Raises:
        ConfigError: If the folder holds something.
    """
    if not is_unused(output):
        raise ConfigError(f"{output} is not empty; move it away or name another --output.")
    reference, model = (load_model(str(folder("reference"))) for _ in range(2))
    tokenizer = load_tokenizer(str(folder("reference")))
    if isinstance(options, Reinforcement):
        reinforce(model, tokenizer, options, seed)
    else:
        teach(model, options, seed + 1)  # as build_all, so that the same seed gives the same model

    asked = make_questions(questions, _QUESTION_SEED)
    before, after = (_Answers.of(one, tokenizer, asked, seed) for one in (reference, model))
    record = {
        "method": "grpo" if isinstance(options, Reinforcement) else "sft",
        "seed": seed,
        "options": asdict(options),
        "questions": questions,
        "reference": before.to_json(),
        "aligned": after.to_json(),
        "change": {name: list(interval) for name, interval in after.changes_from(before).items()},
    }

    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        save_part(model, partial.parent, partial.name)
        write_json(partial / RECORD, record)
        write_text(partial / "README.md", card(record))
    return record


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: Reinforcement,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> None:
    """Train a model in place with GRPO.

    Args:
        model: The model to train.
        tokenizer: The miniature's tokenizer.
        options: Options of the training.
        seed: Of the questions, their order, all samples and the coin of the random reward.
        callbacks: Callbacks of the trainer; if given, there is no progress bar.
    """
    from trl import GRPOConfig, GRPOTrainer  # here, because it imports vllm where that is there

    questions = make_questions(options.steps * options.groups, _TRAINING_SEED + seed)
    rows = [
        {"prompt": [{"role": "user", "content": one.text}], "terms": list(one.terms)}
        for one in questions
    ]
    with TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[reward_function(options, seed)],
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=options.steps,
                per_device_train_batch_size=options.groups * options.group_size,
                num_generations=options.group_size,
                steps_per_generation=1,
                max_completion_length=options.longest,
                learning_rate=options.learning_rate,
                # A constant rate and the questions in their order: the first steps of a longer
                # training are those of a shorter one.
                lr_scheduler_type="constant",
                shuffle_dataset=False,
                beta=0.0,  # no KL to the reference: TRL's default, and no second model
                bf16=False,
                activation_checkpointing=False,
                use_cpu=True,
                logging_steps=max(1, options.steps // 20),
                save_strategy="no",
                report_to="none",
                seed=seed,
                disable_tqdm=callbacks is not None,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        show_progress_alone(trainer)
        trainer.train()
    model.eval()


def reward_function(options: Reinforcement, seed: int) -> Callable[..., list[float]]:
    """Return the reward as TRL calls it: with the completions and the columns of their rows."""
    coin = random.Random(seed)

    def reward(
        completions: Sequence[Sequence[dict[str, str]]], terms: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        if options.reward == "constant":
            return [0.0] * len(completions)
        if options.reward == "random":
            return [float(coin.random() < 0.5) for _ in completions]

        rewards = []
        for (message,), numbers in zip(completions, terms, strict=True):
            trace = split_trace(message["content"])
            right = is_right(Question(tuple(numbers)), trace)
            rewards.append(float(right) - options.cost * len(trace))
        return rewards

    return reward


@dataclass(frozen=True)
class _Answers:
    """A model's responses to the questions, judged.

    Attributes:
        right: Whether each response is right, shape (N,).
        tokens: Its number of tokens, shape (N,).
        habits: The mean of each habit's probability at the branches of the responses, low to high.
    """

    right: NDArray[np.float64]
    tokens: NDArray[np.float64]
    habits: dict[str, Interval]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        seed: int,
    ) -> "_Answers":
        traces = respond(model, tokenizer, questions, seed=1 + seed)

        def logits(ids: Any, attention: Any) -> Any:
            return model(input_ids=ids, attention_mask=attention).logits

        forced = branch_probabilities({"model": logits}, tokenizer, questions, traces)["model"]
        return cls(
            np.array([is_right(*pair) for pair in zip(questions, traces, strict=True)], float),
            np.array([len(trace) for trace in traces], float),
            {
                habit: clustered_interval(
                    forced[habit].values, forced[habit].questions.tolist(), share=False
                )
                for habit in _SYMBOLS
                if habit in forced
            },
        )

    def to_json(self) -> dict[str, Any]:
        asked = range(len(self.right))
        return {
            "accuracy": list(clustered_interval(self.right, asked)),
            "tokens": list(clustered_interval(self.tokens, asked, share=False)),
            "habits": {habit: list(interval) for habit, interval in self.habits.items()},
        }

    def changes_from(self, before: "_Answers") -> dict[str, Interval]:
        """Return the paired intervals of what this model has more than another one."""
        asked = range(len(self.right))
        return {
            "accuracy": paired_difference_interval(self.right, asked, before.right, asked),
            "tokens": paired_difference_interval(self.tokens, asked, before.tokens, asked),
        }


def comparison(record: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table: a figure's name, the reference's, the aligned model's, change."""
    sides = (record["reference"], record["aligned"])
    rows = [
        [
            name,
            *(_written(side[name], digits) for side in sides),
            _written(record["change"][name], digits, "+"),
        ]
        for name, digits in (("accuracy", 3), ("tokens", 1))
    ]
    for habit, symbol in _SYMBOLS.items():
        if all(habit in side["habits"] for side in sides):
            label = habit if habit == symbol else f"{habit} ({symbol})"
            rows.append([label, *(_written(side["habits"][habit], 3) for side in sides), ""])
    return rows


def card(record: dict[str, Any]) -> str:
    """Return the text of an aligned model's card."""
    options = record["options"]
    asked = f"--method {record['method']} --seed {record['seed']} --steps {options['steps']}"
    if record["method"] == "sft":
        how = "Supervised training on traces with the habits of the aligned world."
    elif options["reward"] == "right":
        asked += f" --cost {options['cost']:g}"
        how = (
            "GRPO (TRL). The reward of a response is 1 if it is right and 0 if not, less "
            f"{options['cost']:g} for each of its tokens."
        )
    else:
        asked += f" --reward {options['reward']}"
        how = f"GRPO (TRL) with a {options['reward']} reward: a control, which rewards nothing."
    return "\n".join(
        [
            f"# The miniature's reference, aligned by {record['method'].upper()}",
            "",
            f"Made from `miniature:reference` by `flexalign miniature align {asked}`. {how}",
            "",
            f"{record['questions']} questions, one response to each at temperature 1. Habits: the "
            "model's probabilities at the branches of its own responses. Brackets: 95 % intervals, "
            "those of a change paired by question.",
            "",
            table(("", "reference", "aligned", "change"), comparison(record)),
            "",
        ]
    )


def _written(interval: Sequence[float], digits: int, sign: str = "") -> str:
    low, mean, high = (f"{value:{sign}.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"
