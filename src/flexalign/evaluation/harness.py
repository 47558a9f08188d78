"""The model ``flexalign`` for lm-evaluation-harness: a model with a dial, at one setting.

::

    python -m flexalign.evaluation.harness --model flexalign --tasks gsm8k \\
        --model_args pretrained=models/base,adapter=out/adapter,lambda=0.5
    python -m flexalign.evaluation.harness --model flexalign --tasks gsm8k --apply_chat_template \\
        --model_args "pretrained=models/base,aligned_system=Answer briefly.,lambda=1.5"

This is the harness's own command with one more model: lm_eval does not search for models outside
its own list. In Python, importing this module registers the model.

Prompts, batches, log-likelihoods and metrics are those of the harness: the class below is its
``hf`` with the logits of equation 5, so that both ends of the dial have the results of ``hf``.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from flexalign._spelling import nearest
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.generation import TwoModelDecoder, TwoPromptDecoder
from flexalign.generation.adapted import BasedModel
from flexalign.generation.dial_config import require_base
from flexalign.generation.fused import positions_of
from flexalign.lambdas import Exit, Fixed, Policy, Setting
from flexalign.lora_dial import LoRADialConfig
from flexalign.lora_dial.modeling import GATE_REFUSED
from flexalign.models.loading import fingerprint
from flexalign.models.prompted import PromptPair, TwoPrompts, require_context
from flexalign.systems import LocalBackend, System, SystemOptions
from flexalign.systems.dials import read_dial

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import resolve_max_length
except ImportError as error:
    _NEEDED = (
        "lm-evaluation-harness is not installed here; install it with: "
        "pip install 'flexalign[evaluation]'"
    )
    if __name__ == "__main__":
        print(f"error: {_NEEDED}", file=sys.stderr)
        sys.exit(2)
    raise ConfigError(_NEEDED) from error


@register_model("flexalign")
class HarnessModel(HFLM):  # type: ignore[misc]
    """A model, a trained dial or a pair, at one setting, for lm_eval's tasks.

    It runs in one process; ``parallelize=True`` distributes it over the GPUs of a machine.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        aligned: str | None = None,
        reference_system: str | None = None,
        reference_template: Any = None,
        aligned_system: str | None = None,
        aligned_template: Any = None,
        lam: Any = None,
        policy: Any = None,
        gate: float | None = None,
        extrapolate: bool = False,
        by_id: bool = False,
        device: str | None = None,
        dtype: str = "auto",
        parallelize: bool = False,
        trust_remote_code: bool = False,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        """Load a model; arguments are those of ``--model_args``.

        Args:
            pretrained: A folder or a known name: the base of an adapter, or the reference.
            adapter: A dial on the base: an InRa adapter or a LoRA.
            aligned: Instead of an adapter, the model of λ = 1, or a PEFT adapter on the reference.
            reference_system: The system message of the prompt of λ = 0, for one model under two
                prompts; these need ``--apply_chat_template``.
            reference_template: Its template arguments, a mapping or YAML of one, such as
                ``{enable_thinking: true}``.
            aligned_system: The system message of the prompt of λ = 1.
            aligned_template: Its template arguments.
            lam: The setting, ``lambda`` on the command line: a number, or a schedule's JSON. If
                not given, the adapter's default, or 1 for a pair.
            policy: Instead of `lam`, a policy such as ``adaptive 0.5``. Policies and schedules only
                set λ of responses; log-likelihoods need one number.
            gate: As in :func:`flexalign.fusion.fuse`.
            extrapolate: Permit a λ outside the adapter's range, or below 0 for a pair.
            by_id: Take special tokens of a pair for the same where only their names differ.
            device: The model's device; a GPU if there is one.
            dtype: The type of the weights; ``"auto"`` for the stored type.
            parallelize: Distribute the weights over all GPUs.
            trust_remote_code: Permit running code from a checkpoint.
            max_length: Longest sequence in tokens; the base's own if not given.
            **options: Other arguments of lm_eval's ``hf``: ``batch_size``, ``add_bos_token``, ….

        Raises:
            ConfigError: If a model is missing, an argument is unknown or not served, or the
                arguments contradict each other.
            CheckpointError: If the adapter is missing or damaged.
            LambdaError: If λ is not finite, or not permitted.
        """
        asked = {"lambda": options.pop("lambda", None), "lam": lam, "policy": policy}
        prompts = _read_prompts(
            (reference_template, reference_system), (aligned_template, aligned_system)
        )
        has_dial = adapter is not None or aligned is not None or prompts is not None
        check_arguments(options, has_dial=has_dial)
        if by_id and (aligned is None or adapter is not None or prompts is not None):
            raise ConfigError("by_id= is about two models; name the other one as aligned=….")
        setting = _read_setting(asked, adapter, aligned, prompts, gate)
        if adapter is not None:
            config = read_dial(adapter)  # a missing adapter raises CheckpointError here
            if gate is not None and isinstance(config, LoRADialConfig):
                raise ConfigError(f"gate=: {GATE_REFUSED}")
            require_base(config, fingerprint(pretrained), pretrained, adapter, insist="")

        backend = LocalBackend(
            System.of(pretrained, adapter, aligned, prompts),
            options=SystemOptions(dtype=dtype, gate=gate, prompts=prompts, by_id=by_id),
            trust_remote_code=trust_remote_code,
        )
        setting = setting or backend.default
        if not extrapolate:
            backend.require_range([setting], permit="say extrapolate=True")

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        where = "auto" if parallelize else None if device == "cpu" else device
        model = backend.load(device_map=where)
        leader, tokenizer = _leader(model), getattr(model, "tokenizer", backend.text.tokenizer)
        if options.get("add_bos_token") is not None:
            # `hf` gives this to the tokenizer that it loads; this one is loaded already.
            tokenizer.add_bos_token = bool(options["add_bos_token"])

        self._facts: dict[str, Any] = {"pretrained": pretrained}
        self._facts |= {"adapter": adapter} if adapter is not None else {}
        self._facts |= {"aligned": aligned} if aligned is not None else {}
        self._facts |= {"prompts": prompts.to_json()} if prompts is not None else {}
        self._prompts = _PromptTexts(model) if isinstance(model, TwoPromptDecoder) else None
        dial = setting.dial
        self._dial, self._gate = dial, gate
        self._asked = {} if dial is None else {"lam": dial, "gate": gate}
        if dial is not None:
            self._facts |= {"dial": dial.to_json(), "gate": gate}
        self._facts["fingerprint"] = fingerprint(pretrained)
        self._identity = backend.describe() | {"dial": self._facts.get("dial"), "gate": gate}

        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length or resolve_max_length(leader.config, tokenizer),
            **{"backend": "causal"} | options,
        )

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval caches prompts."""
        name = str(self._facts["pretrained"])
        return PurePath(name).name.replace(":", "_")

    def get_model_info(self) -> dict[str, Any]:
        """Return the models, the dial and the base's fingerprint, for lm_eval's results."""
        return {"model_num_parameters": self.model.num_parameters(), "flexalign": self._facts}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Give the harness's cache of requests (``--use_cache``) a table of this setting's own.

        The harness identifies a request by its prompt alone, so a second run at another λ would
        get the answers of the first.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            identity = json.dumps(self._identity, sort_keys=True)
            table = f"flexalign_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
            type(answers)(answers.filename, tablename=table).close()  # creates the table
            answers.tablename = table
        super().set_cache_hook(cache_hook)

    # One model under two prompts: the harness knows the reference's text, and each text leads to both.

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; of two prompts, return the reference's."""
        if self._prompts is None:
            rendered: str = super().apply_chat_template(chat_history, add_generation_prompt)
            return rendered
        if not add_generation_prompt:
            raise ConfigError(
                "two prompts have no place for a task's gen_prefix, the beginning of an answer; "
                "measure a task without one."
            )
        return self._prompts.render(chat_history)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode contexts; of two prompts, return the reference's and keep the aligned ones."""
        if self._prompts is None:
            encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(
                strings, padding_side, left_truncate_len, truncation
            )
            return encoded
        return self._prompts.encode(strings, left_truncate_len)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._prompts is None:
            scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return scored

        lam = self._one_lambda()
        size = override_bs or (1 if self.batch_size == "auto" else int(self.batch_size))
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            scores = self._prompts.score(batch, lam, self._gate)
            for (texts, _, _), score in zip(batch, scores, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, score)
            found += scores
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, which two prompts do not have."""
        if self._prompts is not None:
            raise ConfigError(
                "whole texts are scored without a prompt, and so alike under both; measure a task "
                "with questions."
            )
        scored: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return scored

    def _one_lambda(self) -> float:
        """Return the λ of log-likelihoods.

        Raises:
            ConfigError: If the setting is a policy or a schedule.
        """
        if not isinstance(self._dial, Fixed):
            raise ConfigError(
                "log-likelihoods need one λ (lambda=0.5): a policy or a schedule chooses it for "
                "responses, and this task has answers to be scored."
            )
        return self._dial.lam

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        if self._dial is None:
            logits: Tensor = super()._model_call(inps)
            return logits
        lam = self._one_lambda()
        with torch.no_grad():
            fused: Tensor = self.model(inps, lam=lam, gate=self._asked["gate"]).logits
        return fused

    def _model_generate(
        self, context: Tensor, max_length: int, stop: Sequence[str], **options: Any
    ) -> Tensor:
        if self._prompts is not None:
            options |= self._prompts.take_aligned()
        if not isinstance(self._dial, Policy):
            written: Tensor = super()._model_generate(
                context, max_length, stop, **options, **self._asked
            )
            return written

        # lm_eval's 0 means greedy, which `generate` expresses by do_sample.
        temperature = options.pop("temperature", None)
        options |= {"temperature": temperature} if temperature else {"do_sample": False}
        routed: Tensor = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([_StopTexts(self.tokenizer, stop, context)]),
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
            **self._asked,
        )
        return routed


class _PromptTexts:
    """The contexts of the harness, which are texts, and both prompts that each of them stands for."""

    def __init__(self, model: TwoPromptDecoder) -> None:
        self._model = model
        self._known: dict[str, TwoPrompts] = {}
        self._aligned: dict[str, Tensor] = {}

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation under both prompts; return the reference's text."""
        both = self._model.rendering.both([dict(message) for message in messages])
        self._known[both.reference.text] = both
        return both.reference.text

    def encode(self, texts: Sequence[str], room: int | None) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the reference's prompts, and keep those of the aligned ones.

        Raises:
            ConfigError: If a text was not rendered here.
            DataError: If a prompt is longer than the room for it.
        """
        both = [self._find(text) for text in texts]
        for prompt in both:
            require_context(len(prompt.reference.ids), len(prompt.aligned.ids), room)
        inputs = self._model.encode(both)
        self._aligned = {name: inputs[name] for name in self._model.row_inputs}
        return inputs["input_ids"], inputs["attention_mask"]

    def take_aligned(self) -> dict[str, Tensor]:
        """Return the aligned prompts of the last batch that was encoded."""
        aligned, self._aligned = self._aligned, {}
        return aligned

    @torch.no_grad()
    def score(self, requests: Any, lam: float, gate: float | None) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        rows, continuations = [], []
        for (context, text), _, moved in requests:
            both = self._find(context)
            sides = (both.reference, both.aligned)
            white = {side.text[len(side.text.rstrip()) :] for side in sides}
            if len(white) == 1 and white != {""}:
                # As in `hf`: the white space at the prompt's end is scored with the continuation.
                continuation, prompts = moved, [self._ids(side.text.rstrip()) for side in sides]
            else:
                continuation, prompts = self._ids(text), [side.ids for side in sides]
            # The last token of a continuation predicts nothing.
            whole = [prompt + continuation[:-1] for prompt in prompts]
            pairs = zip(sides, whole, strict=True)
            rows.append(TwoPrompts(*(replace(side, ids=ids) for side, ids in pairs)))
            continuations.append(continuation)

        inputs = self._model.encode(rows)
        longest = max(map(len, continuations))
        logits = self._model(
            **inputs,
            position_ids=positions_of(inputs["attention_mask"]),
            lam=lam,
            gate=gate,
            logits_to_keep=longest,
        ).logits

        # Prompts are padded on the left, so a continuation's predictions are the last columns.
        found = []
        for row, continuation in zip(logits, continuations, strict=True):
            own = row[-len(continuation) :].float().log_softmax(-1)
            tokens = torch.tensor(continuation, device=own.device)
            likelihood = float(own.gather(-1, tokens[:, None]).sum())
            found.append((likelihood, bool((own.argmax(-1) == tokens).all())))
        return found

    def _ids(self, text: str) -> list[int]:
        tokenizer: Any = self._model.tokenizer
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find(self, text: str) -> TwoPrompts:
        if text not in self._known:
            raise ConfigError(
                "two prompts need a conversation to be rendered under both: say "
                "--apply_chat_template, and leave --cache_requests out."
            )
        return self._known[text]


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends each row that contains one of the texts.

    The harness's own criterion assumes one generation with a fixed set of rows; a policy runs
    several, each with some of the rows.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompts: Tensor) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._start = prompts.shape[1]
        # A text may begin and end within tokens, so two more than its own are searched.
        self._reach = 2 + max((len(tokenizer.encode(text)) for text in texts), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ends = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._reach :])
        found = [any(text in end for text in self._texts) for end in ends]
        return torch.tensor(found, device=input_ids.device)


def _read_prompts(
    reference: tuple[Any, str | None], aligned: tuple[Any, str | None]
) -> PromptPair | None:
    """Read template arguments and system message of both prompts; None if neither is given."""
    read = [
        PromptSettings.parse(yaml.safe_load(given) if isinstance(given, str) else given, system)
        for given, system in (reference, aligned)
    ]
    prompts = PromptPair(*read)
    return None if prompts == PromptPair() else prompts


def _read_setting(
    asked: dict[str, Any],
    adapter: str | None,
    aligned: str | None,
    prompts: PromptPair | None,
    gate: float | None,
) -> Setting | None:
    """Read the setting, which has several names; None if it is not given."""
    given = {name: value for name, value in asked.items() if value is not None}
    if adapter is not None and aligned is not None:
        raise ConfigError("give adapter= or aligned=, not both: each makes a dial of its own.")
    if prompts is not None and (adapter is not None or aligned is not None):
        other = "adapter" if adapter is not None else "aligned"
        raise ConfigError(
            "two prompts (reference_system=, reference_template=, aligned_system=, "
            f"aligned_template=) are a dial of one model; leave them out, or {other}=."
        )
    if len(given) > 1:
        raise ConfigError(f"give one of {' and '.join(given)}: they are names of one dial.")
    has_dial = adapter is not None or aligned is not None or prompts is not None
    if (given or gate is not None) and not has_dial:
        name = next(iter(given), "gate")
        raise ConfigError(
            f"{name}= needs a dial: adapter=… or aligned=… beside pretrained=…, or the model's own "
            "aligned_system=…."
        )
    setting = Setting.of(next(iter(given.values()))) if given else None
    if setting is not None and isinstance(setting.dial, Exit):
        raise ConfigError(
            f"{setting.id}: exits are not available in lm-eval, whose stop texts count from the "
            "prompt; take an adaptive policy, or flexalign evaluate."
        )
    return setting


_INSTEAD = {
    "backend": "the models are causal ones; leave it out",
    "peft": "name the PEFT adapter as aligned=…",
    "delta": "save the sum as a model and give that as pretrained=…",
    "tokenizer": "the tokenizer is the base's own, as the adapter was trained with it",
    "use_fast_tokenizer": "the tokenizer is the base's own",
    "revision": "give a folder that holds that revision as pretrained=…",
    "subfolder": "give the folder itself as pretrained=…",
    "gguf_file": "give a folder with the GGUF file as pretrained=…",
    "autogptq": "give a model whose weights are not quantised",
    "gptqmodel": "give a model whose weights are not quantised",
    "mixed_precision_dtype": "give dtype=…, the type of the weights",
    "tp_plan": "give parallelize=True, which distributes the layers",
    "max_memory_per_gpu": "parallelize=True uses what is free",
    "max_cpu_memory": "parallelize=True uses what is free",
    "offload_folder": "parallelize=True does not offload",
}
"""Arguments of ``hf`` that have no effect here, and what to do instead."""


def check_arguments(options: Mapping[str, Any], *, has_dial: bool) -> None:
    """Refuse arguments that would have no effect.

    Args:
        options: The arguments of ``--model_args`` besides those that :class:`HarnessModel` declares.
        has_dial: Whether the model has a dial.

    Raises:
        ConfigError: If one is unknown, or an argument of ``hf`` that is not served.
    """
    own = [*inspect.signature(HarnessModel.__init__).parameters][1:-1]
    known = [*own, "lambda", *inspect.signature(HFLM.__init__).parameters]
    known = [name for name in dict.fromkeys(known) if name not in ("self", "kwargs")]

    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"the model has no argument {name!r}{nearest(name, known)}")

        # A value that asks for what is done anyway is not refused.
        served = name not in _INSTEAD or value in (None, False, "")
        served = served or (name, value) in {("backend", "causal"), ("revision", "main")}
        served = served or (name == "backend" and value == "default")
        served = served or (name == "mixed_precision_dtype" and not has_dial)
        if not served:
            raise ConfigError(f"{name}={value} is not served by this model: {_INSTEAD[name]}.")


def _leader(model: Any) -> Any:
    """Return the transformers model with the configuration of a loaded system."""
    if isinstance(model, TwoModelDecoder):
        return model.reference
    return model.base if isinstance(model, BasedModel) else model


def main() -> None:
    """Run lm_eval's command line with the model ``flexalign``.

    An expected error becomes one sentence, and the exit code that :mod:`flexalign.cli` has for it:
    2 for wrong input, 1 for a failure while running.
    """
    try:
        cli_evaluate()
    except FlexAlignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
