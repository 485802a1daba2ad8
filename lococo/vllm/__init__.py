"""LoCoCo inside vLLM: its continuous batching, parallelism and servers over a page of constant size for every request.

Chosen with ``--attention-backend CUSTOM --additional-config '{"lococo": {"num_slots": 512}}'``; see docs/vllm.md.
"""


def register() -> None:
    """Entry point of ``vllm.general_plugins``, called in every process of vLLM, maybe more than once."""
    from lococo.vllm import backend

    backend.register()
