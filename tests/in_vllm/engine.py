"""One engine of vLLM in a process of its own: told on the command line what to do, it writes JSON into a file."""

import json
import sys

import torch

PREEMPTED_AT = (3, 9, 14)


def prompts_of(work):
    """Token ids of some lengths, the same for the same seed."""
    generator = torch.Generator().manual_seed(work.get("seed", 0))
    return [torch.randint(5, work["vocab"], (length,), generator=generator).tolist() for length in work["lengths"]]


def main(work, path):
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    options = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=1000,
        enable_prefix_caching=False,
        seed=0,
    )
    if work["lococo"] is not None:
        options |= {"attention_backend": "CUSTOM", "additional_config": {"lococo": work["lococo"]}}
    llm = LLM(model=work["model"], **{**options, **work.get("options", {})})
    seen = record_layers() if work.get("records") else []
    engine, cache = llm.llm_engine, llm.llm_engine.vllm_config.cache_config
    sampling = SamplingParams(temperature=0, max_tokens=work.get("new_tokens", 12), ignore_eos=True)
    answers, preempted = [], 0
    for _ in range(work.get("times", 1)):
        requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts_of(work)]
        for index, prompt in enumerate(requests):
            engine.add_request(str(index), prompt, sampling)
        found, steps = {}, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found[int(output.request_id.partition("-")[0])] = list(output.outputs[0].token_ids)
            steps += 1
            if work.get("preempts") and steps in PREEMPTED_AT:
                preempted += bool(engine.reset_prefix_cache(reset_running_requests=True))
        answers.append([found[index] for index in range(len(requests))])
    result = {"answers": answers, "preempted": preempted, "blocks": cache.num_gpu_blocks, "wrapped": is_wrapped()}
    if seen:
        result["wrong_by"] = compare(seen)
    with open(path, "w") as file:
        json.dump(result, file)


def is_wrapped():
    from vllm.model_executor.layers.attention import Attention

    return hasattr(Attention.get_kv_cache_spec, "lococo")


def record_layers():
    """What goes into every layer and comes out, text by text."""
    from lococo.vllm.backend import LoCoCoImpl

    seen, by_page, forward = [], {}, LoCoCoImpl.forward

    def recorded(self, layer, query, key, value, kv_cache, metadata, output, *more, **named):
        result = forward(self, layer, query, key, value, kv_cache, metadata, output, *more, **named)
        if metadata is not None:
            taken = [(piece.page, piece.seen, piece.tokens) for piece in metadata.pieces]
            if metadata.steps is not None:
                pages, tokens = metadata.steps.pages.tolist(), metadata.stepping.tolist()
                seen_before = metadata.steps.seen[:, 0].tolist()
                taken += [(*each, slice(at, at + 1)) for *each, at in zip(pages, seen_before, tokens, strict=True)]
            for page, before, tokens in taken:
                if not before:
                    seen.append((self, []))
                    by_page[layer.layer_name, page] = seen[-1][1]
                parts = tuple(each[tokens].clone() for each in (query, key, value, output))
                by_page[layer.layer_name, page].append(parts)
        return result

    LoCoCoImpl.forward = recorded
    return seen


def compare(seen):
    """Largest error of a layer's output, relative to its largest number, by tokens read."""
    from lococo.attention import LayerReading, read_layer
    from lococo.cache.layer import LayerCache
    from lococo.cache.plan import RowState, plan_call

    wrong = {}
    for impl, parts in seen:
        query, key, value, output = (torch.cat(each).transpose(0, 1)[None] for each in zip(*parts, strict=True))
        paged = impl._paged[1]

        def plan_for(config, tokens=query.shape[2]):
            return plan_call([RowState()], tokens, config)

        reading = LayerReading(plan_for, impl.scale, paged.modules)
        with torch.no_grad():
            expected = read_layer(LayerCache(paged.config, paged.layer_idx), reading, query, key, value)
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        wrong[query.shape[2]] = max(wrong.get(query.shape[2], 0.0), error)
    return wrong


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
