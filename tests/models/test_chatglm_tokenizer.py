"""Converted tokenizers give the ids that SentencePiece gives, and conversations those of the original code."""

import importlib
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_chatglm import tiny_tokenizer_model
from transformers import AutoTokenizer

from lococo.models.chatglm.tokenizer import CONTROL_TOKENS, ROLE_TOKENS, end_ids, fast_tokenizer, tokenizer_config

SHARED = Path(__file__).parents[3] / "shared/data"
MODEL = SHARED / "tokenizers/chatglm3/tokenizer.model"
TEXTS = [
    "",
    " ",
    "    ",
    "\n",
    "\n\n\n",
    "\t\ttabs and \r\n line ends",
    "Hello, world! It's 2023; pi is 3.14159.",
    "  two  spaces   and   three  ",
    "你好，世界！今天天气怎么样？",
    "大模型 ChatGLM3-6B-32k 支持 32768 个 token。",
    "def f(x):\n    return x ** 2  # 平方\n",
    "😀 👩‍👩‍👧 emoji and ﷺ ༀ 𝒳 rare letters",
    "ＡＢＣ ① ½ é e\u0301 \u200b \ufeff are left as they are",
    "▁ is the mark of a space",
    "<0x0A> <|user <user> [MASK",
    "sophisticated people, developers: sopeop",
    "=====-----#####*****" * 20,
]
CHAT = [
    {"role": "system", "content": "You are ChatGLM3."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！\nHow can I help?"},
    {"role": "user", "content": "  Two spaces, please.\n"},
]


def load(folder, path, generation):
    fast_tokenizer(path, generation).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(generation)))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny_tokenizer_model().SerializeToString())
    return path


@pytest.fixture
def tiny(tmp_path, model_file):
    return load(tmp_path, model_file, 3)


class TestTiny:
    def test_every_text_starts_with_its_prefix(self, tiny):
        ids = tiny("ab").input_ids
        assert tiny.convert_ids_to_tokens(ids) == ["[gMASK]", "sop", "▁ab"]
        assert tiny("ab", add_special_tokens=False).input_ids == ids[2:]
        assert tiny.convert_ids_to_tokens(tiny("a", "b").input_ids) == ["[gMASK]", "sop", "▁a", "▁", "b", "</s>"]

    @pytest.mark.parametrize(("generation", "expected"), [(2, CONTROL_TOKENS), (3, CONTROL_TOKENS + ROLE_TOKENS)])
    def test_control_tokens_follow_the_pieces(self, tmp_path, model_file, generation, expected):
        pieces = len(tiny_tokenizer_model().pieces)
        tokenizer = load(tmp_path, model_file, generation)
        assert len(tokenizer) == pieces + len(expected)
        assert tokenizer.convert_ids_to_tokens(range(pieces, len(tokenizer))) == list(expected)

    def test_ends_of_an_answer(self, model_file):
        assert end_ids(fast_tokenizer(model_file, 2)) == [2]
        tokenizer = fast_tokenizer(model_file, 3)
        assert [tokenizer.id_to_token(index) for index in end_ids(tokenizer)] == [
            "</s>",
            "<|user|>",
            "<|observation|>",
        ]

    def test_pads_on_the_left(self, tiny):
        batch = tiny(["ab", "abab"], padding=True)
        assert tiny.pad_token_id == 0 and tiny.eos_token_id == 2
        assert batch.input_ids[0][0] == 0 and batch.attention_mask[0][0] == 0
        assert 0 not in batch.attention_mask[1]

    def test_control_tokens_in_a_text_are_recognised(self, tiny):
        tokens = tiny.convert_ids_to_tokens(tiny("a<|user|>b sop", add_special_tokens=False).input_ids)
        assert tokens == ["▁a", "<|user|>", "▁", "b", "▁", "sop"]

    def test_control_words_within_words_are_not(self, tiny):
        assert "sop" not in tiny.convert_ids_to_tokens(tiny("asop sopa", add_special_tokens=False).input_ids)

    def test_control_tokens_are_left_out_of_an_answer(self, tiny):
        ids = tiny("ab cd<|user|>").input_ids
        assert tiny.decode(ids, skip_special_tokens=True) == "ab cd"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda model: setattr(model.trainer_spec, "model_type", 1), "model_type must be 2 .*got 1"),
            (lambda model: setattr(model.trainer_spec, "byte_fallback", False), "byte_fallback must be True"),
            (lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False), "add_dummy_prefix must be True"),
            (lambda model: model.normalizer_spec.ClearField("remove_extra_whitespaces"), "remove_extra_whitespaces"),
            (lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
            (lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"x"), "precompiled_charsmap"),
            (lambda model: setattr(model.pieces[0], "piece", "<?>"), "type of <unk> must be 2 .*got None"),
            (lambda model: setattr(model.pieces[2], "type", 1), "type of </s> must be 3 .*got 1"),
            (lambda model: setattr(model.pieces[260], "type", 4), r"user-defined or unused pieces must be \[\]"),
        ],
    )
    def test_other_models_are_refused(self, model_file, change, message):
        model = tiny_tokenizer_model()
        change(model)
        model_file.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=rf"tokenizer\.model: {message}"):
            fast_tokenizer(model_file, 3)

    def test_without_protobuf(self, model_file, monkeypatch):
        def absent():
            raise ImportError("protobuf")

        # The attribute of this name in the package may be the function instead.
        module = importlib.import_module("transformers.convert_slow_tokenizer")
        monkeypatch.setattr(module, "import_protobuf", absent)
        with pytest.raises(ImportError, match=r"pip install 'lococo\[chatglm\]'"):
            fast_tokenizer(model_file, 3)


class TestTemplates:
    def test_chatglm3(self, tiny):
        text = tiny.apply_chat_template(CHAT[1:3], tokenize=False)
        assert text == "[gMASK]sop<|user|>\n 你好<|assistant|>\n 你好！\nHow can I help?"
        assert (
            tiny.apply_chat_template(CHAT[1:3], tokenize=False, add_generation_prompt=True) == text + "<|assistant|>"
        )
        call = [{"role": "assistant", "metadata": "get_weather", "content": ""}]
        assert tiny.apply_chat_template(call, tokenize=False) == "[gMASK]sop<|assistant|>get_weather\n"

    def test_chatglm2(self, tmp_path, model_file):
        tokenizer = load(tmp_path, model_file, 2)
        text = tokenizer.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True)
        first = "[gMASK]sop[Round 1]\n\n问：你好\n\n答：你好！\nHow can I help?\n\n"
        assert text == first + "[Round 2]\n\n问：  Two spaces, please.\n\n\n答："
        assert tokenizer.apply_chat_template(CHAT[1:3], tokenize=False) == first
        with pytest.raises(Exception, match="ChatGLM2 knows the roles user and assistant, got system"):
            tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.fixture(scope="module")
def pieces():
    import sentencepiece

    if not MODEL.is_file():
        pytest.skip("needs ../shared/data/tokenizers/chatglm3")
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


@pytest.fixture(scope="module")
def real(pieces, tmp_path_factory):
    return {generation: load(tmp_path_factory.mktemp("real"), MODEL, generation) for generation in (2, 3)}


class TestAgainstSentencePiece:
    @pytest.mark.parametrize("text", TEXTS)
    def test_same_ids_and_back(self, pieces, real, text):
        ids = real[3](text, add_special_tokens=False).input_ids
        assert ids == pieces.encode(text)
        assert real[3](text).input_ids == [64790, 64792, *ids]
        back = real[3].decode(real[3](text).input_ids, skip_special_tokens=True)
        assert back == text.replace("▁", " "), "the mark of a space is read as a space, here and in SentencePiece"

    @settings(max_examples=300)
    @given(text=st.text(st.sampled_from("ab er.,=-#012\n\t▁é你好的是。😀\u3000")) | st.text())
    def test_any_text(self, pieces, real, text):
        assume(not any(token.content in text for token in real[3].added_tokens_decoder.values()))
        ids = real[3](text, add_special_tokens=False).input_ids
        assert ids == pieces.encode(text)
        assert real[3].decode(ids) == pieces.decode(ids) == text.replace("▁", " ")

    @pytest.mark.parametrize("domain", ["wikipedia_zh", "wikipedia", "code", "math_latex"])
    def test_documents(self, pieces, real, domain):
        path = SHARED / f"text/{domain}/heldout.jsonl"
        if not path.is_file():
            pytest.skip("needs ../shared/data/text")
        with path.open(encoding="utf-8") as file:
            text = json.loads(next(file))["text"][:20000]
        assert real[3](text, add_special_tokens=False).input_ids == pieces.encode(text)

    def test_control_tokens(self, real):
        assert len(real[2]) == 64794 and len(real[3]) == 64798
        assert real[3].convert_tokens_to_ids(["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]) == [*range(64789, 64794)]
        assert real[3].convert_tokens_to_ids(list(ROLE_TOKENS)) == [64794, 64795, 64796, 64797]

    def test_conversation_with_chatglm3(self, pieces, real):
        expected = [64790, 64792]
        for message in CHAT:
            role = real[3].convert_tokens_to_ids(f"<|{message['role']}|>")
            expected += [role, *pieces.encode("\n"), *pieces.encode(message["content"])]
        chat = real[3].apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
        assert chat["input_ids"] == [*expected, 64796]

    def test_conversation_with_chatglm2(self, pieces, real):
        prompt = (
            "[Round 1]\n\n问：你好\n\n答：你好！\nHow can I help?\n\n[Round 2]\n\n问：  Two spaces, please.\n\n\n答："
        )
        chat = real[2].apply_chat_template(CHAT[1:], add_generation_prompt=True, return_dict=True)
        assert chat["input_ids"] == [64790, 64792, *pieces.encode(prompt)]
