"""A server of OpenAI's protocol with a dial on every request.

``protocol`` reads bodies into ``requests`` and tells their answers, ``dial`` says what λ a request may
have, ``service`` encodes prompts and asks the ``engine`` that runs on this machine, and ``app`` joins
them to routes. ``server`` is the process. Before vLLM (``vllm``) the same rules stand in a
``middleware``.
"""
