"""λ for vLLM's model runner V1, which is what runs on CPUs: the one private hook of the plugin.

It relies on these parts of vLLM 0.32, all in ``vllm/v1/worker/gpu_model_runner.py``:

* ``GPUModelRunner._model_forward`` runs the model on every real batch (not on dummy ones), for
  the CPU's runner and other subclasses too; its docstring says that it may be overridden. It is
  given ``input_ids`` and ``positions`` as the model gets them.
* By then ``input_batch.req_ids[:input_batch.num_reqs]`` are the batch's requests in their order,
  ``query_start_loc.np`` says where the tokens of each start, and ``requests`` maps their ids to
  ``sampling_params``, ``num_prompt_tokens``, ``prompt_token_ids`` and ``output_token_ids``.
* ``get_model()`` is the model without wrappers.

:func:`require_delivery` tries it when a model is loaded, so that a vLLM in which one of these
changed refuses to serve, where it would otherwise serve a λ that nobody asked for.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexalign.errors import ServingError
from flexalign.serving.vllm.lambdas import LAMBDA_KEY, DialSettings, TokenLambdas


def install() -> None:
    """Let the model runner write every batch's λ before it runs the model. Twice is once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._model_forward
    if getattr(original, "delivers_lambda", False):
        return

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _deliver(self, input_ids, positions)
        return original(self, input_ids, positions, *args, **kwargs)

    forward.delivers_lambda = True  # type: ignore[attr-defined]
    GPUModelRunner._model_forward = forward


def require_delivery() -> None:
    """See that a λ reaches a model, by every kind of runner that is loaded.

    Raises:
        ServingError: If it does not.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (GPUModelRunner, *_subclasses(GPUModelRunner)):
        try:
            delivered = _delivers(runner)
        except Exception as error:
            raise ServingError(f"{_refusal(runner)} ({type(error).__name__}: {error})") from error
        if not delivered:
            raise ServingError(_refusal(runner))


def _deliver(runner: Any, input_ids: Tensor | None, positions: Tensor | None) -> None:
    """Write the λ of the batch that a runner is about to run."""
    lambdas = getattr(runner.get_model(), "lambdas", None)
    if not isinstance(lambdas, TokenLambdas):
        return  # a model without a dial
    if positions is None:
        raise ServingError(_refusal(type(runner)))

    lambdas.forget_others(runner.requests.keys())
    batch = runner.input_batch
    dials = []
    for request_id in batch.req_ids[: batch.num_reqs]:
        request = runner.requests[request_id]
        dials.append(
            lambdas.dial(
                request_id,
                request.sampling_params,
                request.num_prompt_tokens,
                request.prompt_token_ids,
                request.output_token_ids,
            )
        )

    lambdas.write(dials, runner.query_start_loc.np[: len(dials) + 1], positions, input_ids)


def _delivers(kind: type[Any]) -> bool:
    """Run one batch of two requests through a runner that has nothing but what the hook needs."""
    received: list[list[float]] = []
    lambdas = TokenLambdas(torch.zeros(3, device="cpu"), DialSettings(default_lambda=0.25))

    class Model:
        def __init__(self) -> None:
            self.lambdas = lambdas

        def __call__(self, **_: Any) -> None:
            received.append(lambdas.values.tolist())

    def request(extra_args: dict[str, Any] | None) -> Any:
        return SimpleNamespace(
            sampling_params=SimpleNamespace(extra_args=extra_args),
            num_prompt_tokens=1,
            prompt_token_ids=[0],
            output_token_ids=[],
        )

    runner: Any = object.__new__(kind)
    runner.model = Model()
    runner.requests = {"asks": request({LAMBDA_KEY: 0.5}), "does not": request(None)}
    runner.input_batch = SimpleNamespace(req_ids=list(runner.requests), num_reqs=2)
    runner.query_start_loc = SimpleNamespace(np=np.array([0, 2, 3]))
    positions = torch.tensor([0, 1, 0], device="cpu")
    runner._model_forward(input_ids=None, positions=positions)
    return received == [[0.5, 0.5, 0.25]]


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _refusal(runner: type[Any]) -> str:
    return (
        f"a request's λ would not arrive: vLLM's {runner.__name__} does not run the model as the "
        "plugin relies on; install the versions of constraints-vllm.txt, without other plugins "
        "that change the model runner."
    )
