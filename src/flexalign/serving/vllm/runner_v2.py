"""λ for vLLM's model runner V2, by its official hook: a model brings its own ``ModelState``.

That runner needs Triton, so what is tested here is this class with batches made by hand; it has
not been run in vLLM.
"""

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from flexalign.errors import ServingError
from flexalign.serving.vllm.lambdas import RequestDial, TokenLambdas


class DialModelState(DefaultModelState):  # type: ignore[misc]
    """Knows the dial of every request, and writes a batch's λ before the model runs."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._dials: dict[int, RequestDial] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Start a request, or start it again after it was preempted."""
        super().add_request(req_index, new_req_data)
        lambdas: TokenLambdas = self.model.lambdas
        self._dials[req_index] = lambdas.start(
            new_req_data.sampling_params,
            len(new_req_data.prompt_token_ids),
            new_req_data.prefill_token_ids,
        )

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Write the λ of a batch; a graph that was captured reads it from the same place."""
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        count = input_batch.num_reqs
        self.model.lambdas.write(
            [self._dials[index] for index in input_batch.idx_mapping_np[:count].tolist()],
            input_batch.query_start_loc_np[: count + 1],
            input_batch.positions,
            input_batch.input_ids,
        )
        return inputs


def require_delivery(vllm_config: Any, model: Any) -> None:
    """See that the runner will ask :class:`DialModelState`.

    Raises:
        ServingError: If it will not.
    """
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    if resolve_model_state_cls(vllm_config, model) is not DialModelState:
        raise ServingError(
            "a request's λ would not arrive: vLLM's model runner V2 does not ask the model for its "
            "state; install the versions of constraints-vllm.txt, or set VLLM_USE_V2_MODEL_RUNNER=0."
        )
