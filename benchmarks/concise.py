"""λ < 0 that pays: a pair that differs in `again` alone, as two models, as one LoRA, as an adapter.

    python benchmarks/concise.py                       # hours on one core; a stopped run goes on
    python benchmarks/concise.py --systems pair        # only the two models, decoded together
    python benchmarks/concise.py --no-places --systems --many   # the gain at −0.5 over 20 000
    python benchmarks/concise.py --quick               # minutes: few questions and steps
    python benchmarks/concise.py --rewrite             # only write the table of what is stored

At each λ from −1 to 1: accuracy and tokens against equation 5's closed form, and the gain over
λ = 0, paired by question. Three systems: the reference and `miniature:concise`; one LoRA for all λ
of [−1, 2], trained over the two; a layer adapter, trained towards the concise model. Before layer 0
(InRa's place) and further up it is trained with few and with more steps: which place and steps
reach the habit that the pair differs in. 5000 questions tell a gain of 0.02 hardly from 0, so that
λ = −0.5 is measured again over 20 000.

A cell (system, λ; or place, steps) is stored in ``out/concise`` as soon as it is measured, and the
trained weights beside it. What is there is not made again.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _cells import (
    QUESTION_SEED,
    fused_logits,
    logits_of,
    measured,
    read_cells,
    store,
    trained,
    trained_dial,
)
from _concise_report import PLACES, SYSTEMS, publish, report

WORK = Path("out/concise")
REFERENCE_PART, CONCISE_PART = "miniature:reference", "miniature:concise"
DIAL_RANGE = {"low": -1.1, "high": 2.1}
"""A little beyond [−1, 2]: the ends of a range are learnt from one side only."""

ORDER = (-0.5, 0.0, -0.25, -1.0, 1.0, 0.5)
"""In which the λ are measured: what the gain is judged by comes first."""


def run_system(
    system: str, options: dict[str, Any], cells: Path, lams: Sequence[float] = ORDER
) -> None:
    """Measure what is missing of a system, λ by λ.

    Args:
        system: One of `SYSTEMS`.
        options: The options; ``work`` is where what is trained is kept.
        cells: The folder of the cells.
        lams: The λ.
    """
    missing = [lam for lam in lams if not _cell(cells, system, lam).is_file()]
    if not missing:
        return
    from flexalign.miniature import CONCISE, REFERENCE, make_questions
    from flexalign.miniature.closed_form import token_level
    from flexalign.miniature.demo import respond
    from flexalign.miniature.measure import is_right
    from flexalign.models.pair import ModelPair

    pair = ModelPair.load(REFERENCE_PART, CONCISE_PART)
    sides = [_side_logits(pair, side) for side in ("reference", "aligned")]
    questions = make_questions(options["questions"], QUESTION_SEED)
    for lam in missing:
        model, settings, training = _MAKERS[system](pair, lam, options)
        traces = respond(
            model, pair.tokenizer, questions, seed=1, batch_size=options["batch_size"], **settings
        )
        row = {"system": system, "lambda": lam, "training": training}
        row |= measured(
            system,
            questions,
            traces,
            tokenizer=pair.tokenizer,
            world=token_level(REFERENCE, CONCISE, lam),
            pair=fused_logits(sides[0], sides[1], lam, None),
            model=None if system == "pair" else _own_logits(system, model, lam),
            judged=options["judged"],
        )
        right = (is_right(*one) for one in zip(questions, traces, strict=True))
        row |= {
            "right": "".join("01"[one] for one in right),
            "lengths": [len(trace) for trace in traces],
        }
        store(_cell(cells, system, lam), row)
        print(_cell(cells, system, lam).name, flush=True)


def _cell(work: Path, system: str, lam: float) -> Path:
    return work / f"{system},lambda={lam:g}.json"


def _pair(pair: Any, lam: float, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """The two models, fused while they decode; at either end the one model that it is."""
    from flexalign import TwoModelDecoder
    from flexalign.models.loading import load_model

    if lam in (0.0, 1.0):
        return load_model(CONCISE_PART if lam else REFERENCE_PART), {}, None
    return TwoModelDecoder(pair), {"lam": lam}, None


def _dial(pair: Any, lam: float, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """The LoRA dial, trained once for all λ; each λ is then merged."""

    def train(folder: Path) -> dict[str, Any]:
        return trained(
            folder,
            reference=REFERENCE_PART,
            aligned=CONCISE_PART,
            lam=DIAL_RANGE,
            gate=None,
            steps=options["dial_steps"],
            learning_rate=1.5e-3,
            seed=0,
            lora=True,
        )

    dial, training = trained_dial(REFERENCE_PART, Path(options["work"]) / "dial", train)
    return dial.merged(lam), {}, training


def _adapter(pair: Any, lam: float, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """The reference's stream and that of the adapter, fused while they decode."""
    from flexalign import ModelPair, TwoModelDecoder
    from flexalign.models.loading import load_model

    place, steps = options["adapter"]
    stream, _ = adapter_stream(place, steps, Path(options["work"]))
    if place == 0:
        model: Any = stream.model
    else:
        model = TwoModelDecoder(ModelPair.of(load_model(REFERENCE_PART), stream, pair.tokenizer))
    return model, {"lam": lam}, {"place": place, "steps": steps}


_MAKERS = {"pair": _pair, "dial": _dial, "adapter": _adapter}


def _side_logits(pair: Any, side: str) -> Any:
    return lambda ids, attention: pair.logits(side, input_ids=ids, attention_mask=attention)


def _own_logits(system: str, model: Any, lam: float) -> Any:
    from _adapters import dial_logits

    return logits_of(model) if system == "dial" else dial_logits(model, lam)


def adapter_stream(place: int, steps: int, work: Path) -> tuple[Any, int]:
    """Train a layer adapter towards the concise model, or load it; return it and its parameters."""
    import torch
    from _adapters import Variant, make, plain_logits, stream_logits, towards
    from safetensors.torch import load_file, save_file

    from flexalign.models.loading import load_model

    stream, parameters = make(Variant("", place=place))
    file = work / f"place={place},steps={steps}.safetensors"
    if file.is_file():
        kept = load_file(file)
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(kept[str(number)])
    else:
        towards(
            stream_logits(stream),
            parameters,
            plain_logits(load_model(REFERENCE_PART)),
            plain_logits(load_model(CONCISE_PART)),
            steps=steps,
            learning_rate=3e-3,
        )
        work.mkdir(parents=True, exist_ok=True)
        save_file({str(n): p.detach().clone() for n, p in enumerate(parameters)}, file)
    return stream.eval(), sum(parameter.numel() for parameter in parameters)


def run_place(place: int, steps: int, options: dict[str, Any]) -> None:
    """Train a layer adapter towards the concise model, and measure its habits at λ = 1."""
    work = Path(options["work"])
    cell = work / f"place={place},steps={steps}.json"
    if cell.is_file():
        return
    from _adapters import stream_logits, walked

    from flexalign.miniature import CONCISE, make_questions
    from flexalign.miniature.measure import branch_probabilities, mean_habits
    from flexalign.models.loading import load_tokenizer

    stream, parameters = adapter_stream(place, steps, work)
    questions = make_questions(options["judged"], QUESTION_SEED)
    values = branch_probabilities(
        {"it": stream_logits(stream)},
        load_tokenizer(REFERENCE_PART),
        questions,
        walked(questions, CONCISE),
    )
    habits = asdict(mean_habits(values["it"]))
    store(cell, {"place": place, "steps": steps, "parameters": parameters, "habits": habits})
    print(cell.name, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table of all that is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 questions, 20 steps")
    parser.add_argument("--rewrite", action="store_true", help="only write the table again")
    parser.add_argument("--systems", nargs="*", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument(
        "--places", action=argparse.BooleanOptionalAction, default=True, help="of the adapter"
    )
    parser.add_argument(
        "--many",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="λ = −0.5 over 20 000 questions; unless said, where all systems are measured",
    )
    chosen = parser.parse_args(arguments)
    options = {
        "work": str(WORK.with_name("concise-quick") if chosen.quick else WORK),
        "questions": 100 if chosen.quick else 5000,
        "many": 200 if chosen.quick else 20_000,
        "judged": 50 if chosen.quick else 400,
        "dial_steps": 20 if chosen.quick else 700,
        "batch_size": 40,
        "places": [(place, 20) for place in (0, 1)] if chosen.quick else PLACES,
        "adapter": (1, 20 if chosen.quick else 150),
    }
    work = Path(options["work"])
    many = work / "many"
    if not chosen.rewrite:
        import torch

        torch.set_num_threads(1)
        for place, steps in options["places"] if chosen.places else ():
            run_place(place, steps, options)
        for system in chosen.systems:
            run_system(system, options, work)
        if chosen.many or (chosen.many is None and list(chosen.systems) == list(SYSTEMS)):
            larger = options | {"questions": options["many"]}
            run_system("pair", larger, many, (0.0,))  # of all systems: the reference
            for system in SYSTEMS:
                run_system(system, larger, many, (-0.5,))

    places = [json.loads(path.read_text(encoding="utf-8")) for path in work.glob("place=*.json")]
    results = {
        "options": options,
        "rows": read_cells(work),
        "places": places,
        "many": read_cells(many),
    }
    if chosen.quick:
        print(report(results))
    else:
        publish(results)


if __name__ == "__main__":
    main()
