"""Models for lm-eval (EleutherAI's harness) that read through slots, and read what prompts share once.

``python -m lococo.evaluation.harness run --model lococo --model_args pretrained=MODEL,method=h2o,num_slots=256 ...``
is lm-eval's own command with them; ``accelerate launch -m lococo.evaluation.harness run ...`` shares the items out.
The plain ``lm_eval`` does not know them: its registry (0.4.13) holds the names of its own list, reads no entry points
and imports nothing else before the model is made.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from lococo.compat import with_cache
from lococo.evaluation.prefixes import PrefixReader
from lococo.methods import chosen_config
from lococo.patch import patch_model

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(f"tasks are measured with lm-eval ({error}): pip install lococo[eval]") from error

# Continuations of one prompt that are scored together, each on a copy of its cache.
ROWS = 32


class PrefixLM(HFLM):
    """lm-eval's model of Transformers, with no token of a shared beginning read again and again.

    Prompts longer than ``max_length`` are refused: lm-eval would cut their beginning, in the middle of an example.
    With a ``batch_size`` of more than one, answers are generated in padded batches, and their prompts are read whole.

    Parameters
    ----------
    pretrained : str or transformers.PreTrainedModel
        Patched or not.
    truncate : "middle", optional
        Leave out the middle of longer prompts, as LongBench does (Bai et al. 2024, Section 4.1).
    **kwargs
        As lm-eval's ``HFLM`` takes them: ``batch_size``, ``max_length``, ``gguf_file``, ...
    """

    def __init__(self, pretrained: Any, truncate: str | None = None, **kwargs: Any) -> None:
        if truncate not in (None, "middle"):
            raise ValueError(f"truncate must be middle, or not given, got {truncate!r}")
        self.truncate = truncate
        # A prompt is encoded for its length and for each of its answers.
        self._encode = functools.lru_cache(maxsize=16)(super().tok_encode)
        super().__init__(pretrained, backend="causal", **kwargs)
        self.forget()

    def forget(self) -> None:
        """Begin anew, as one must after the model was patched or unpatched."""
        self.reader = PrefixReader(self.model)

    def tokens_read(self, arguments: Sequence[Any]) -> tuple[int, int]:
        """Tokens of a request's prompt, and those that go through the model in all, an answer of any length included.

        Parameters
        ----------
        arguments : sequence
            Prompt and continuation, or prompt and settings of ``generate``.
        """
        prompt, answer = arguments
        if isinstance(answer, str):
            context, continuation = self._encode_pair(prompt, answer)
            return len(context), len(context) + len(continuation) - 1
        tokens = len(self.tok_encode(prompt))
        return tokens, tokens + normalize_gen_kwargs(answer, self.max_gen_toks)["max_gen_toks"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """Token ids of a text."""
        return list(self._encode(string, add_special_tokens, **settings))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a continuation; for an empty prompt stands what lm-eval reads in its place."""
        if context:
            return super()._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return ([self.prefix_token_id], ids) if ids[0] != self.prefix_token_id else (ids[:1], ids[1:])

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until a stop string."""
        self._refuse_long(self.tokens_read(request.args)[1] for request in requests)
        if self.batch_size != 1:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        prompts = [self._generation_ids(*request.args) for request in requests]
        order = sorted(range(len(requests)), key=prompts.__getitem__)
        self.reader.expect(prompts[place][:-1] for place in order)
        answers = [""] * len(requests)
        for place in tqdm(order, desc="generate_until", disable=disable_tqdm or self.rank != 0):
            answers[place] = super().generate_until([requests[place]], disable_tqdm=True)[0]
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of texts, (texts, tokens) each, cut to ``left_truncate_len`` as ``truncate`` says."""
        if self.truncate is None or left_truncate_len is None:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [without_middle(self.tok_encode(each), left_truncate_len) for each in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        self._refuse_long(len(tokens) + len(continuation) - 1 for _, tokens, continuation in requests)
        same = defaultdict(list)
        for place, (_, tokens, _) in enumerate(requests):
            same[tuple(tokens)].append(place)
        asked = []
        for context, group in same.items():
            room = self.max_length + 1 - max(len(requests[place][2]) for place in group)
            prompt = without_middle(context, room)
            asked += [(prompt, group[start : start + ROWS]) for start in range(0, len(group), ROWS)]
        asked.sort()
        self.reader.expect(prompt[:-1] for prompt, _ in asked)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or self.rank != 0) as bar:
            for prompt, group in asked:
                scores = self.reader.score(prompt, [requests[place][2] for place in group])
                for place, score in zip(group, scores, strict=True):
                    answers[place] = score
                    text = requests[place][0]
                    if text is not None:  # a part of a rolling one, which is cached as a whole
                        self.cache_hook.add_partial("loglikelihood", text, score)
                bar.update(len(group))
        return answers

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        if context.shape[0] > 1 or self.reader.reads_whole_texts:
            self.reader.tokens_read += int(settings["attention_mask"].sum())
        else:
            cache = self.reader.read(context[0, :-1].tolist())
            self.reader.tokens_read += 1
            settings |= {} if cache is None else with_cache(self.model, cache)
        return super()._model_generate(context, max_length, stop, **settings)

    def _generation_ids(self, prompt: str, settings: dict[str, Any]) -> list[int]:
        """Token ids of a prompt, as ``generate`` is given them."""
        room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        return self.tok_batch_encode([prompt], left_truncate_len=room)[0][0].tolist()

    def _refuse_long(self, lengths: Iterable[int]) -> None:
        longest = max(lengths, default=0)
        if longest > self.max_length and self.truncate is None:
            raise ValueError(
                f"a prompt and its answer have {longest} tokens, max_length is {self.max_length}: raise it or take "
                "fewer examples ('lococo eval tasks' leaves out as many as it must), or say truncate=middle"
            )


def without_middle(ids: Sequence[int], limit: int) -> list[int]:
    """The first and the last of too many tokens, ``limit`` in all."""
    if len(ids) <= limit:
        return list(ids)
    return [*ids[: (limit + 1) // 2], *ids[len(ids) - limit // 2 :]]


@register_model("lococo")
class LoCoCoLM(PrefixLM):
    """A model patched by a method, under the name ``lococo`` in lm-eval.

    Parameters
    ----------
    pretrained : str or transformers.PreTrainedModel
        Not patched.
    method, num_slots, block_size, heads, slot_bits : optional
        As ``lococo.methods.chosen_config`` takes them.
    **kwargs
        As ``PrefixLM`` takes them.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str | None = None,
        num_slots: int | None = None,
        block_size: int | None = None,
        heads: str | None = None,
        slot_bits: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        bits = None if slot_bits is None else str(slot_bits)  # lm-eval reads 8 as a number, 8-4 as text
        config = chosen_config(method, num_slots, block_size, heads, bits)
        super().__init__(pretrained, **kwargs)
        if config is not None:
            patch_model(self.model, config, heads=heads)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
