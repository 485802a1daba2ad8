"""Other libraries save the unpatched model, and write and score with the patched one."""

import copy

import gguf
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from tiny import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)
from wrapped import IDS, assert_equal, logits, patched

import lococo


def test_save_pretrained_writes_the_unpatched_model(tmp_path, full, compressed):
    tiny_llama().save_pretrained(tmp_path / "unpatched")
    model = patched(tiny_llama())
    model.save_pretrained(tmp_path / "patched")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("unpatched", "patched")]
    assert files[0].keys() == files[1].keys()
    configs = [(tmp_path / name / "config.json").read_text() for name in ("unpatched", "patched")]
    assert configs[0] == configs[1]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "patched")
    assert not lococo.is_patched(loaded)
    assert_equal(logits(loaded), full, atol=0)
    assert_equal(logits(model), compressed, atol=0)


def write_gguf(model, path):
    """A GGUF file with the shapes of a model and its weights as they are."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_model_is_patched_and_saved_like_any_other(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    plain = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    expected = logits(plain)
    assert (logits(patched(model)) - expected).abs().max() > 1
    assert_equal(logits(model), logits(patched(plain)), atol=0)
    lococo.save_heads(model, tmp_path / "heads")
    if getattr(model, "hf_quantizer", None) is not None:
        with pytest.raises(ValueError, match="(?i)gguf"):
            model.save_pretrained(tmp_path / "saved")
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(tmp_path / "saved")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal(logits(saved), expected, atol=0)
    assert_equal(logits(lococo.patch_model(saved, heads=tmp_path / "heads")), logits(model), atol=0)


WORDS = ["<pad>", "<eos>", *(f"t{index}" for index in range(2, 64))]


def text(ids):
    return " ".join(WORDS[index] for index in ids.tolist())


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    by_words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_words, pad_token="<pad>", eos_token="<eos>")


def continued_greedily(model, ids, count):
    """(count,) next tokens, each from a forward over the whole text."""
    length = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, length:]


def test_text_generation_pipeline_writes_what_the_patched_model_says(tokenizer):
    prompt = IDS[:1, :50]
    generate = pipeline("text-generation", model=patched(tiny_llama()), tokenizer=tokenizer)
    result = generate(text(prompt[0]), max_new_tokens=20, do_sample=False, return_tensors=True)
    expected = continued_greedily(patched(tiny_llama()), prompt, 20)
    assert result[0]["generated_token_ids"][50:] == expected.tolist()
    assert expected.tolist() != continued_greedily(tiny_llama(), prompt, 20).tolist()


def continuation_score(model, context, continuation):
    ids = torch.cat([context, continuation])[None]
    scores = logits(model, ids[:, :-1])[0, -len(continuation) :].log_softmax(dim=-1)
    return scores.gather(-1, continuation[:, None]).sum().item()


def test_lm_eval_scores_with_the_patched_model(tokenizer):
    pairs = [
        (IDS[0, :50], IDS[0, 50:57]),
        (IDS[1, :9], IDS[1, 9:12]),
        (IDS[1, :33], IDS[1, 33:64]),
        (IDS[0, :40], IDS[1, :3]),
    ]
    requests = [
        Instance("loglikelihood", {}, (text(context), " " + text(continuation)), index)
        for index, (context, continuation) in enumerate(pairs)
    ]
    model = patched(tiny_llama())
    scores = [score for score, _ in HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests)]
    assert scores == pytest.approx([continuation_score(model, *pair) for pair in pairs], abs=1e-4)
    unpatched = [continuation_score(tiny_llama(), *pair) for pair in pairs]
    differs = [abs(score - other) > 0.1 for score, other in zip(scores, unpatched, strict=True)]
    assert differs == [True, False, True, True]
