"""Linear layers quantised by bitsandbytes, in its build for CPUs."""

import pytest
from datasets import Dataset
from quantized import check_adapters, check_heads, check_pieces, check_slots, small_model
from safetensors.torch import load_file
from small_training import Witness, arguments, lora, old_names, parts_with_gradients, tokenizer, words
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
from wrapped import assert_equal, logits, patched

pytestmark = old_names
# Above the threshold a column is an outlier for all tokens of a call: numbers would depend on what is read at once.
EIGHT = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
# Rounding to bfloat16 in the kernel for 4 bits.
FORMATS = pytest.mark.parametrize(("quantization", "atol"), [(EIGHT, 1e-4), (FOUR, 0.1)], ids=["8bit", "4bit"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def make(plain, quantization):
    return lambda: AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization).eval()


@FORMATS
def test_slots(make, atol):
    check_slots(make, atol)


@FORMATS
def test_pieces(make, atol):
    check_pieces(patched(make()), atol)


@FORMATS
def test_heads(make, atol, tmp_path):
    check_heads(make, tmp_path / "heads")


@FORMATS
def test_adapters(make, atol):
    check_adapters(make)


@FORMATS
def test_sft_of_adapters_and_heads(make, atol, tmp_path):
    witness = Witness()
    run = SFTTrainer(
        model=patched(make()),
        args=arguments(SFTConfig, tmp_path, max_steps=2),
        train_dataset=Dataset.from_dict({"text": [words(60, 1), words(46, 2)]}),
        processing_class=tokenizer(),
        peft_config=lora(modules_to_save=["lococo_head"]),
        callbacks=[witness],
    )
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    loss = patched(make())(**batch).loss.item()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, abs=max(atol, 0.01))
    assert parts_with_gradients(witness) == {"lora", "heads"}


@pytest.mark.parametrize("quantization", [EIGHT], ids=["8bit"])
def test_it_is_saved_without_heads(make, tmp_path):
    """Not with 4 bits: on a CPU bitsandbytes 0.50 changes a model that it saves, patched or not."""
    full, model = logits(make()), patched(make())
    compressed = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("lococo" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_equal(logits(loaded), full, atol=0)
    assert_equal(logits(patched(loaded)), compressed, atol=0)
