"""A server of OpenAI's protocol with a dial on every request.

``protocol`` reads bodies into ``requests`` and writes their answers, ``dial`` defines which λ a request
may have, ``service`` encodes prompts and submits them to the ``engine`` on this machine, and ``app``
makes routes of them. ``server`` is the process. For vLLM (``vllm``), a ``middleware`` applies the same
rules.
"""
