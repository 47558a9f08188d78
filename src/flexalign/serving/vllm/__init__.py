"""InRa on vLLM: a plugin, no fork, with a λ on every request.

``folder`` writes what vLLM loads: a base, its adapter, one configuration. ``plugin`` is what vLLM
itself finds (entry point ``vllm.general_plugins``), and loads in each of its processes, whatever
model they run; everything else is imported for a model with a dial alone. ``models`` gives stock
models the second stream, ``lambdas`` says which λ each token of a batch has, and ``runner`` (vLLM's
model runner V1) and ``state`` (V2) hand it over. ``admission`` refuses a malformed λ by request.
"""
