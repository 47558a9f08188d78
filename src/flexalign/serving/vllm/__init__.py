"""InRa adapters and LoRA dials on vLLM: a plugin, no fork, with a λ on every request.

``folder`` writes what vLLM loads: a base, its adapter, one configuration. ``plugin`` is what vLLM
itself finds (entry point ``vllm.general_plugins``), and loads in each of its processes, whatever
model they run; everything else is imported for a model with a dial alone. ``models`` gives stock
models InRa's second stream or a LoRA in their layers, ``lambdas`` says which λ each token of a batch has, and ``runner_v1`` and
``runner_v2``, for vLLM's two model runners, hand it over.

Over HTTP: ``launch`` starts vLLM's own server, and ``middleware`` stands before it, with ``adaptive``
for the fast answer of an adaptive policy and ``responses`` for what a client gets to read.
"""
