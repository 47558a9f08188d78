"""``flexalign inspect``: what a model is, whether two fit together, and what their dial turns."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flexalign.cli.console import (
    print_json,
    progress_bar,
    result_console,
    say,
    warnings_as_notes,
    without_downloads,
)
from flexalign.cli.dial_facts import DialFacts, read_dial_facts
from flexalign.cli.options import (
    AlignedPrompt,
    AllowPickle,
    ByID,
    Dtype,
    ReferencePrompt,
    read_prompt_pair,
    refuse_options,
)
from flexalign.errors import ConfigError, FlexAlignError

if TYPE_CHECKING:
    from datasets import Dataset

    from flexalign.analysis.difference import Difference, TokenChange, TokenizedRow
    from flexalign.models.compatibility import ModelFacts, PairFacts
    from flexalign.models.prompted import PromptPair


def inspect(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A model's folder, hub id or known name; of a pair, the reference."),
    ],
    aligned: Annotated[
        str | None,
        typer.Argument(
            help="The aligned model, or a PEFT adapter, LoRA dial or InRa adapter on the reference."
        ),
    ] = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    by_id: ByID = False,
    diff: Annotated[
        Path | None,
        typer.Option(help="Responses (JSONL, …) on which to see where the two differ."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Only the first rows of --diff, this many.")
    ] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of --diff read together.")] = 16,
    dtype: Dtype = "auto",
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Load the pair even if memory seems too small.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Permit a model's own code to run.")
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Show what a model is, whether two fit together, and what λ would turn between them.

    Of a trained dial it shows what its folder says: base, λ, gate and calibration. No weights are loaded without --diff. A pair that does not fit ends with exit code 2.

    Examples:

    [cyan]flexalign inspect smollm2[/cyan]

    [cyan]flexalign inspect models/base models/concise[/cyan]

    [cyan]flexalign inspect models/base models/concise --diff traces.jsonl[/cyan]

    [cyan]flexalign inspect smollm2 --aligned-prompt system='Answer in one short sentence.'
    --diff traces.jsonl[/cyan]
    """
    if diff is None:
        refuse_options(context, "without --diff", of=("limit", "batch_size"))
    from flexalign.models.sources import aligned_beside

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    prompts = read_prompt_pair(reference_prompt, aligned_prompt)
    if by_id and (aligned is None or prompts is not None):
        raise ConfigError("--by-id compares the tokens of two models; name the aligned one too.")
    if prompts is not None:
        if aligned is not None:
            raise ConfigError("two prompts are a dial of one model; leave them out, or ALIGNED.")
        loading = {**options, "allow_pickle": allow_pickle}
        _inspect_prompts(model, prompts, diff, limit, batch_size, loading, as_json=as_json)
        return

    if diff is not None and aligned is None:
        aligned = aligned_beside(model)
        if aligned is None:
            raise ConfigError("--diff compares two models; name the aligned one too.")

    if aligned is not None and (inra := _inra_facts(aligned, at_hub=diff is not None)) is not None:
        if by_id:
            raise ConfigError(
                f"--by-id is about two models, and {aligned} is an adapter; leave it out."
            )
        loading = {**options, "allow_pickle": allow_pickle}
        _inspect_adapter(model, inra, diff, limit, batch_size, loading, as_json=as_json)
        return
    if aligned is None and (inra := _inra_facts(model, at_hub=False)) is not None:
        if as_json:
            print_json({"dial": inra.to_json()})
        else:
            _show_dial(inra)
        return

    names = [model] if aligned is None else [model, aligned]
    _say_slow_parts(names)
    if diff is None and not trust_remote_code:
        _leave_torch_out(names)
    from flexalign.models.compatibility import examine, examine_pair

    if aligned is None:
        with without_downloads(dry_run=True):
            one = examine(model, **options)
            dial = read_dial_facts(model)
        if as_json:
            print_json(one.to_json() | _dial_json(dial))
        else:
            _show_models(one)
            _show_dial(dial)
        return

    with without_downloads(dry_run=diff is None):
        facts = examine_pair(model, aligned, by_id=by_id, **options)
        dial = read_dial_facts(aligned)
    if not as_json:
        _show_models(facts.reference, facts.aligned)
        _show_dial(dial)
        _show_verdict(facts)

    difference = None
    if diff is not None and facts.fits:
        loading = {**options, "allow_pickle": allow_pickle, "allow_oversize": anyway}
        difference = _measure(facts, diff, limit, batch_size, loading)

    if as_json:
        extra = {} if difference is None else {"difference": difference.to_json()}
        print_json(facts.to_json() | _dial_json(dial) | extra)
    elif difference is not None:
        _show_difference(difference)
    if not facts.fits:
        raise typer.Exit(2)


def _say_slow_parts(models: list[str]) -> None:
    """Name the GGUF files on stderr: what is in the header of other models takes time there."""
    from flexalign.models.sources import require_gguf, resolve

    for source in map(resolve, models):
        if source.gguf_file is not None:
            require_gguf()
            say(f"reading {source}, a GGUF file, and building its tokenizer")


def _leave_torch_out(models: list[str]) -> None:
    """Let transformers be imported without torch, where all that is read is in plain folders.

    Configurations, tokenizers, headers and fingerprints need no torch, but transformers imports it
    wherever it is installed, which takes longer than all else here. A GGUF file, an adapter,
    pickled weights and a comparison of equal models need it.
    """
    from flexalign.models.hub import downloads_wait
    from flexalign.models.sources import resolve
    from flexalign.models.weights import fingerprint_folder, tensor_infos

    if {"torch", "transformers"} & sys.modules.keys():
        return
    sources = [resolve(model) for model in models]
    if any(source.is_adapter or source.gguf_file for source in sources):
        return
    try:
        with downloads_wait():
            infos = [info for source in sources for info in tensor_infos(source.path).values()]
            is_readable = all(info.is_known_to_numpy for info in infos)
            folders = sources if is_readable else []
            prints = {fingerprint_folder(source.path) for source in folders}
    except FlexAlignError:
        return  # said where the models are examined, or the weights are at the hub
    if len(prints) == len(models):
        # transformers and the modules that it imports then take torch for not installed.
        sys.modules["torch"] = None  # type: ignore[assignment]


def _measure(
    facts: "PairFacts", path: Path, limit: int, batch_size: int, loading: dict[str, Any]
) -> "Difference":
    from flexalign.analysis.difference import load_rows
    from flexalign.models.pair import ModelPair

    rows = load_rows(path, facts.tokenizer, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has said it all
        pair = ModelPair.load_examined(facts, say=say, **loading)
    return _read_difference("reading with both models", pair, path, rows, batch_size)


def _read_difference(
    label: str, dial: Any, path: Path, rows: "list[TokenizedRow]", batch_size: int
) -> "Difference":
    """Measure what a dial turns on the first responses of a file, with a bar.

    Args:
        label: Of the bar.
        dial: A pair or an adapter's model, loaded.
        path: The file.
        rows: Its first responses, rendered.
        batch_size: Responses read at one time.
    """
    from flexalign.analysis.difference import measure_difference
    from flexalign.data.formats import load_traces

    given = load_traces(path)
    right = _grade(given, rows, dial.tokenizer)
    with progress_bar(label, len(rows)) as show:
        return measure_difference(
            dial,
            rows,
            batch_size=batch_size,
            right=right,
            available=len(given),
            progress=lambda done, _: show(done),
        )


def _inra_facts(name: str, *, at_hub: bool) -> DialFacts | None:
    """Return what the folder of an InRa adapter says; None if the name is of something else.

    Args:
        name: The name.
        at_hub: Look a repository up as an adapter; if it is a model's, it is looked up once more.
    """
    from flexalign.models.sources import hub_id

    if not at_hub and hub_id(name) is not None:
        return None
    found = read_dial_facts(name)
    return None if found is None or found.is_lora else found


def _inspect_adapter(
    model: str,
    adapter: DialFacts,
    diff: Path | None,
    limit: int,
    batch_size: int,
    loading: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Show an InRa adapter and its base, and, on responses, what the adapter turns."""
    from flexalign.analysis.difference import load_rows
    from flexalign.generation.dial_config import require_base
    from flexalign.inra import InRaModel
    from flexalign.models.compatibility import examine

    _say_slow_parts([model])
    trusted = loading["trust_remote_code"]
    with without_downloads(dry_run=diff is None):
        facts = examine(model, dtype=loading["dtype"], trust_remote_code=trusted)
    if facts.fingerprint is not None:
        require_base(adapter.settings, facts.fingerprint, facts.name, adapter.name, insist="")
    if diff is None:
        if as_json:
            print_json(facts.to_json() | _dial_json(adapter))
        else:
            _show_models(facts)
            _show_dial(adapter)
        return

    rows = load_rows(diff, facts.tokenizer, limit)
    if not as_json:
        _show_models(facts)
        _show_dial(adapter)
    say(f"loading {facts.name}, {facts.gib:.3g} GiB")
    dial = InRaModel.from_pretrained(model, adapter.folder, **loading)
    difference = _read_difference("reading with both streams", dial, diff, rows, batch_size)
    if as_json:
        print_json(facts.to_json() | _dial_json(adapter) | {"difference": difference.to_json()})
    else:
        _show_difference(difference)


def _grade(given: "Dataset", rows: "list[TokenizedRow]", tokenizer: Any) -> list[bool] | None:
    """Return whether each of the first responses is right; None if one has no known answer."""
    from flexalign.evaluation.grading import Answered, Grader
    from flexalign.generation.text import ResponseText

    if "answer" not in given.column_names or None in (golds := given["answer"][: len(rows)]):
        return None
    reader = ResponseText(tokenizer)
    answered = [
        Answered(reader.read(row[1]), gold, opened=reader.is_opened_by(row[0]))
        for row, gold in zip(rows, golds, strict=True)
    ]
    with Grader(tags=reader.tags) as grader:
        return [grade.correct for grade in grader.grade_many(answered)]


def _inspect_prompts(
    model: str,
    prompts: "PromptPair",
    diff: Path | None,
    limit: int,
    batch_size: int,
    loading: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Show both prompts of one model, and, on responses, what the aligned prompt turns."""
    from flexalign.analysis.difference import load_prompted_rows, one_model_pair
    from flexalign.models.compatibility import examine
    from flexalign.models.loading import load_model
    from flexalign.models.prompted import PairRendering, context_of

    _say_slow_parts([model])
    trusted = loading["trust_remote_code"]
    with without_downloads(dry_run=diff is None):
        facts = examine(model, dtype=loading["dtype"], trust_remote_code=trusted)
    with warnings_as_notes():
        context = context_of(facts.config)
        rendering = PairRendering(facts.tokenizer, prompts, context=context)
    both = rendering.both([{"role": "user", "content": "…"}])
    shown = {
        side: {"text": prompt.text, "tokens": len(prompt.ids), "thinking": prompt.opening.value}
        for side, prompt in (("reference", both.reference), ("aligned", both.aligned))
    }
    if not as_json:
        _show_models(facts)
        for side, prompt in shown.items():
            result_console.print(
                f"[bold]the {side} prompt[/bold], {prompt['tokens']} tokens, thinking "
                f"{prompt['thinking']}:"
            )
            result_console.print(str(prompt["text"]), markup=False, soft_wrap=True)

    difference = None
    if diff is not None:
        rows = load_prompted_rows(diff, rendering, limit)
        say(f"loading {facts.name}, {facts.gib:.3g} GiB")
        pair = one_model_pair(load_model(model, **loading), rendering.tokenizers["reference"])
        difference = _read_difference("reading under both prompts", pair, diff, rows, batch_size)

    if as_json:
        extra = {} if difference is None else {"difference": difference.to_json()}
        print_json(facts.to_json() | {"prompts": prompts.to_json(), "rendered": shown} | extra)
    elif difference is not None:
        _show_difference(difference)


def _show_models(*models: "ModelFacts") -> None:
    table = Table("", *(escape(model.name) for model in models))
    for label, values in (
        ("family", [f"{model.family} ({model.kind})" for model in models]),
        ("weights", [f"{model.gib:.3g} GiB" for model in models]),
        ("logits", [f"{model.width:,} wide" for model in models]),
        ("vocabulary", [f"{model.vocabulary:,} tokens" for model in models]),
        ("ends with", [repr(model.eos_token) for model in models]),
        ("chat template", ["yes" if model.has_chat_template else "no" for model in models]),
        ("thinking", [" … ".join(model.thinking_tags or ["no"]) for model in models]),
        ("fingerprint", [model.fingerprint or "(pickled)" for model in models]),
    ):
        table.add_row(label, *map(escape, values))
    result_console.print(table)


def _show_dial(dial: DialFacts | None) -> None:
    if dial is None:
        return
    table = Table("", escape(dial.name), title="the dial")
    for label, value in dial.rows():
        table.add_row(label, escape(value))
    result_console.print(table)


def _dial_json(dial: DialFacts | None) -> dict[str, Any]:
    return {} if dial is None else {"dial": dial.to_json()}


def _show_verdict(facts: "PairFacts") -> None:
    for warning in facts.warnings:
        result_console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    for note in facts.notes:
        result_console.print(f"note: {escape(note)}", soft_wrap=True)
    if facts.problems:
        for problem in facts.problems:
            result_console.print(f"[red]does not fit:[/red] {escape(problem)}", soft_wrap=True)
        return
    base = "one base, and an adapter" if facts.shared_base else "two models"
    result_console.print(
        f"[green]fits:[/green] {facts.vocab_size:,} shared tokens; {base}, {facts.gib:.3g} GiB"
    )


def _show_difference(found: "Difference") -> None:
    gate = "none: they do not differ" if found.gate is None else f"{found.gate:.2g}"
    available = found.rows if found.available is None else found.available
    of_all = f" of {available:,}" if available > found.rows else ""
    result_console.print(
        f"\n{found.rows:,}{of_all} responses, {found.tokens:,} tokens; total variation "
        f"{found.variation:.3g} on average\n"
        f"noise floor {found.noise_floor:.2g}; proposed gate τ = {gate} "
        f"(the difference stands {found.separation:.1f}× above the noise)\n"
        f"tokens above it: {found.share:.1%}"
    )
    if found.separation < 2:
        result_console.print(
            "note: difference and noise pass into each other; a gate cuts somewhere between."
        )
    if found.deeper is not None:
        result_console.print(found.deeper.sentence, markup=False, soft_wrap=True)

    _show_changes("becomes rarer", found.falls)
    _show_changes("becomes more frequent", found.rises)

    table = Table("gives way", "to", "positions", "TV", "probabilities", "context", title="shifts")
    for shift in found.shifts:
        table.add_row(
            escape(repr(shift.falls)),
            escape(repr(shift.rises)),
            f"{shift.positions:,}",
            f"{shift.variation:.2f}",
            f"{shift.falls_reference:.2f} → {shift.falls_aligned:.2f}, "
            f"{shift.rises_reference:.2f} → {shift.rises_aligned:.2f}",
            escape(repr(shift.context)),
        )
    result_console.print(table)


def _show_changes(title: str, changes: "tuple[TokenChange, ...]") -> None:
    table = Table("token", "reference", "aligned", "ln ratio", title=f"{title} (per 1000 tokens)")
    for change in changes:
        table.add_row(
            escape(repr(change.token)),
            f"{change.reference:.2f}",
            f"{change.aligned:.2f}",
            f"{change.log_change:+.2f}",
        )
    result_console.print(table)
