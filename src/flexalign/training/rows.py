"""Trainers that are given token ids: TRL renders nothing a second time."""

from typing import TYPE_CHECKING, Any

from flexalign.data.rendering import tokenize_preferences, tokenize_rows

if TYPE_CHECKING:
    from trl import DPOTrainer as _DPOTrainer
    from trl import SFTTrainer as _SFTTrainer
else:
    _SFTTrainer = _DPOTrainer = object


class RenderedRows(_SFTTrainer):  # type: ignore[misc]
    """A mix-in of `SFTTrainer`: prompts with responses are rendered as inference renders them.

    Rows of another form (`messages` with `assistant_only_loss`, rows with a formatting function,
    token ids) are left to TRL.
    """

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
            dataset = tokenize_rows(
                dataset, getattr(processing_class, "tokenizer", processing_class)
            )
        return super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )


class RenderedPreferences(_DPOTrainer):  # type: ignore[misc]
    """A mix-in of `DPOTrainer`: both responses are rendered as inference renders them."""

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        rendered = tokenize_preferences(dataset, tokenizer)
        if rendered is dataset:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return rendered
        # As TRL does: a prompt that fills the length leaves nothing to compare.
        return rendered.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
