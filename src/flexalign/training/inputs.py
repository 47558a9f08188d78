"""The models, data and prompts of a recipe, read and checked before any weight is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from flexalign.data import Lengths, load_prompts, load_traces, measure_lengths
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import chat_template_of, lengths_of
from flexalign.data.template import replace_template
from flexalign.errors import ConfigError
from flexalign.models.compatibility import PairFacts, examine_pair
from flexalign.models.names import known_name
from flexalign.training.pair_rows import PairRows, PairSurvey
from flexalign.training.recipes import RealignRecipe, Recipe, WatchSettings


def read_traces(recipe: Recipe, *, skip_bad_rows: bool) -> Dataset:
    """Read a recipe's data from a path, or from a known name that has traces.

    Raises:
        ConfigError: If `columns` is given for a known name, or names an unknown field.
        DataError: If the data cannot be read, or a row cannot be used.
    """
    entry, part = known_name(recipe.data) or (None, "")
    if entry is not None and entry.traces is not None and not part:
        _require_file(recipe.data, recipe.columns, "columns")
        return Dataset.from_list(entry.traces())
    return load_traces(
        recipe.data, skip_bad_rows=skip_bad_rows, columns=recipe.columns, places=True
    )


def _require_file(name: str, columns: Mapping[str, str] | None, key: str) -> None:
    """Check that no columns are named for a known name, whose rows are not those of a file.

    Raises:
        ConfigError: If some are.
    """
    if columns is not None:
        raise ConfigError(f"{key} is for files, and {name} has rows of its own; leave it out.")


def settle_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the chat template that a recipe trains with, and what is bound to it.

    Args:
        recipe: Names `training.chat_template_path`, `template` and `thinking`, or none of them.
        tokenizer: The models'; changed in place.

    Raises:
        ConfigError: If there is no template for the arguments, or a marker is not in the
            vocabulary.
    """
    path = getattr(recipe.arguments, "chat_template_path", None)
    if path is not None:
        replace_template(tokenizer, chat_template_of(tokenizer, path))
    recipe.prompting.bind(tokenizer)


@dataclass(frozen=True)
class Watched:
    """Prompts that the student answers during training.

    Attributes:
        prompts: Texts or lists of messages.
        answers: One per prompt, None if it is not known.
    """

    prompts: Sequence[Any]
    answers: Sequence[str | None]


def read_watched(watch: WatchSettings) -> Watched:
    """Read the first prompts of the file, with their answers if the file has them.

    Raises:
        ConfigError: As in `read_traces`.
        DataError: As in `read_traces`.
    """
    entry, part = known_name(watch.prompts) or (None, "")
    if entry is not None and entry.prompts is not None and not part:
        _require_file(watch.prompts, watch.columns, "watch.columns")
        known = entry.prompts(watch.limit)
        return Watched([row["prompt"] for row in known], [row["answer"] for row in known])

    rows = load_prompts(watch.prompts, columns=watch.columns)
    rows = rows.select(range(min(watch.limit, len(rows))))
    answers = rows["answer"] if "answer" in rows.column_names else [None] * len(rows)
    return Watched(list(rows["prompt"]), list(answers))


@dataclass(frozen=True)
class Inputs:
    """The models, data and prompts of a realignment's recipe.

    Attributes:
        pair: Facts about the two models.
        tokenizer: Their tokenizer, with the chat template that training uses. Under two prompts it is
            bound to the reference's, under which the student is asked.
        traces: The data; prompts are as the student is asked.
        lengths: The lengths of the data's rows. Under two prompts the longer one counts.
        watched: Prompts that the student answers during training; None if there are none.
        pair_rows: Renders the data under two prompts; None if neither side has one.
        survey: What the two prompts make of the data; None if neither side has one.
    """

    pair: PairFacts
    tokenizer: PreTrainedTokenizerBase
    traces: Dataset
    lengths: Lengths
    watched: Watched | None
    pair_rows: PairRows | None = None
    survey: PairSurvey | None = None

    @property
    def fingerprints(self) -> tuple[str | None, str | None]:
        """The fingerprints of the reference and the aligned model."""
        return self.pair.reference.fingerprint, self.pair.aligned.fingerprint


def read_inputs(
    recipe: RealignRecipe, *, skip_bad_rows: bool = False, data: Dataset | None = None
) -> Inputs:
    """Read and check everything of a realignment that needs no weights.

    Args:
        recipe: The recipe, which names pair, data and prompts.
        skip_bad_rows: Leave out rows that cannot be used.
        data: Rows in memory, instead of those that the recipe names.

    Raises:
        ConfigError: If something is missing, or cannot be used.
        DataError: If a row cannot be used, or no response token lies within the cut-off.
        PairMismatchError: If the two models do not fit.
    """
    arguments = recipe.arguments
    prompts = recipe.prompts
    facts = examine_pair(
        *recipe.models,
        trust_remote_code=arguments.trust_remote_code,
        prompted=prompts is not None,
        by_id=recipe.by_id,
    )
    facts.require_fit()

    tokenizer = facts.tokenizer
    settle_template(recipe, tokenizer)

    traces = read_traces(recipe, skip_bad_rows=skip_bad_rows) if data is None else data
    asking: PromptSettings | PairRows = recipe.prompting
    pair_rows = survey = None
    if prompts is not None:
        asking = pair_rows = PairRows.of_run(
            tokenizer, prompts, arguments, facts.reference.source, common=recipe.prompting
        )
        tokenizer = pair_rows.tokenizer

    traces = asking.apply(traces)
    if pair_rows is None:
        lengths = measure_lengths(traces, tokenizer, arguments.max_length)
    else:
        survey = pair_rows.survey(traces)
        lengths = lengths_of(survey.sizes, arguments.max_length)

    watched = read_watched(recipe.watch) if recipe.watch else None
    if watched is not None:
        told = [
            asking.with_system({"prompt": prompt}, number)
            for number, prompt in enumerate(watched.prompts, start=1)
        ]
        watched = Watched(told, watched.answers)
    return Inputs(facts, tokenizer, traces, lengths, watched, pair_rows, survey)
