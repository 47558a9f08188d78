"""Mix-ins of TRL's trainers that tokenize the rows themselves, so that TRL renders nothing."""

from typing import TYPE_CHECKING, Any

from flexalign.data.rendering import tokenize_preferences, tokenize_rows
from flexalign.data.template import bind_template, bound_thinking, template_arguments
from flexalign.errors import ConfigError
from flexalign.training.pair_rows import ALIGNED_PROMPT, PairRows

if TYPE_CHECKING:
    from trl import DPOTrainer as _DPOTrainer
    from trl import SFTTrainer as _SFTTrainer
else:
    _SFTTrainer = _DPOTrainer = object


class RenderedRows(_SFTTrainer):  # type: ignore[misc]
    """A mix-in of `SFTTrainer` that renders prompts with responses as inference does.

    TRL prepares all other rows: `messages` with `assistant_only_loss`, rows with a formatting
    function, and token ids.

    With `pair_rows`, every row is rendered under two prompts, and has the aligned side's as the column
    `ALIGNED_PROMPT`.
    """

    _signature_columns: list[str] | None

    def __init__(
        self,
        *args: Any,
        processing_class: Any = None,
        pair_rows: PairRows | None = None,
        **options: Any,
    ) -> None:
        self._pair_rows = pair_rows
        # TRL replaces the template by that of `chat_template_path`, which has nothing bound to it.
        self._bound = _bound_to(processing_class)
        super().__init__(*args, processing_class=processing_class, **options)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        if formatting_func is None and not args.assistant_only_loss:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            if self._bound != _bound_to(tokenizer):
                bind_template(tokenizer, *self._bound)
        if self._pair_rows is not None:
            require_responses(args, formatting_func)
            dataset = self._pair_rows.tokenize(dataset, args.max_length)
        elif formatting_func is None and not args.assistant_only_loss:
            dataset = tokenize_rows(dataset, tokenizer)
        return super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        if self._pair_rows is not None and ALIGNED_PROMPT not in columns:
            self._signature_columns = [*columns, ALIGNED_PROMPT]


def require_responses(args: Any, formatting_func: Any = None) -> None:
    """Check that a run under two prompts trains on one response for each prompt, in a row of its own.

    Raises:
        ConfigError: If a setting trains on other tokens, or joins rows.
    """
    refused = {
        "packing": args.packing,
        "padding_free": args.padding_free,
        "assistant_only_loss": args.assistant_only_loss,
        "completion_only_loss: false": args.completion_only_loss is False,
        "truncation_mode: keep_end": args.truncation_mode == "keep_end",
        "a formatting function": formatting_func is not None,
    }
    for name, is_set in refused.items():
        if is_set:
            raise ConfigError(
                f"training.{name} with two prompts: the two sides see one response after prompts "
                "of different lengths, one in a row; leave it out."
            )


def _bound_to(tokenizer: Any) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Return the template arguments and the thinking markers that are bound to a tokenizer."""
    if tokenizer is None:
        return {}, None
    return template_arguments(tokenizer), bound_thinking(tokenizer)


class RenderedPreferences(_DPOTrainer):  # type: ignore[misc]
    """A mix-in of `DPOTrainer` that renders prompts with both responses as inference does.

    TRL prepares rows without `prompt`, `chosen` and `rejected`.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        rendered = tokenize_preferences(dataset, tokenizer)
        if rendered is dataset:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return rendered

        # As TRL does: after a prompt of the maximal length no response token is left to compare.
        return rendered.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
