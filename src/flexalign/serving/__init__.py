"""A server of OpenAI's protocol with a dial on every request.

``dial`` and ``middleware`` know no engine: the same rules stand before this package's own and
before vLLM. ``protocol`` reads bodies, ``answers`` writes them, ``app`` joins both to the engine
that runs on this machine (``engine``).
"""
