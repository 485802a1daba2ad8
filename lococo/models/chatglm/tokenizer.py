"""The SentencePiece tokenizer of ChatGLM2 and ChatGLM3 as a fast tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

# Ids follow those of the pieces, in this order.
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PREFIX = "[gMASK] sop"
UNKNOWN, END = "<unk>", "</s>"

CHATGLM2_TEMPLATE = """\
[gMASK]sop
{%- set rounds = namespace(number=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set rounds.number = rounds.number + 1 -%}
        {{- '[Round ' ~ rounds.number ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '答：' ~ message['content'] ~ '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('ChatGLM2 knows the roles user and assistant, got ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '答：' -}}
{%- endif -%}
"""

# ChatGLM3 encodes the line of the role and the content one by one, and SentencePiece puts a space before either.
CHATGLM3_TEMPLATE = """\
[gMASK]sop
{%- for message in messages -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ message.get('metadata', '') ~ '\\n' -}}
    {%- if message['content'] -%}
        {{- ' ' ~ message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def fast_tokenizer(path: Path, generation: int) -> Tokenizer:
    """The tokenizer of a ``tokenizer.model``, equal to SentencePiece on any text without control tokens.

    Control tokens and the roles of ChatGLM3 have the ids after the last piece. As in other fast tokenizers they are
    recognised in any text; ``sop`` and ``eop`` only where they stand alone, not in "sophisticated".

    Parameters
    ----------
    path : Path
        A SentencePiece model.
    generation : int
        2 for ChatGLM2, 3 for ChatGLM3, which has tokens for the roles in a conversation.

    Returns
    -------
    tokenizers.Tokenizer
        Every text starts with ``[gMASK] sop``; the second text of a pair ends with ``</s>``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a SentencePiece model of the kind that ChatGLM2 and ChatGLM3 have.
    ImportError
        If protobuf is not installed.
    """
    model = _read_model(path)
    tokenizer = Tokenizer(_byte_pair_encoding(model))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    text_types = (model.SentencePiece.NORMAL, model.SentencePiece.BYTE)
    special = [piece.piece for piece in model.pieces if piece.type not in text_types]
    special += CONTROL_TOKENS if generation == 2 else CONTROL_TOKENS + ROLE_TOKENS
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True, single_word=token.isalpha()) for token in special]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PREFIX} $A",
        pair=f"{PREFIX} $A $B {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*PREFIX.split(), END)],
    )
    return tokenizer


def tokenizer_config(generation: int) -> dict[str, Any]:
    """Content of ``tokenizer_config.json``, readable by Transformers 4 and 5."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "pad_token": UNKNOWN,
        "eos_token": END,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHATGLM2_TEMPLATE if generation == 2 else CHATGLM3_TEMPLATE,
    }


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: of ``</s>``, and in ChatGLM3 of the roles that speak next."""
    ids = [tokenizer.token_to_id(token) for token in (END, "<|user|>", "<|observation|>")]
    return [index for index in ids if index is not None]


def _read_model(path: Path) -> Any:
    """The protocol buffer of a SentencePiece model, checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        from transformers.convert_slow_tokenizer import import_protobuf

        model = import_protobuf().ModelProto()
    except ImportError as error:
        raise ImportError(
            "reading a SentencePiece model needs the package protobuf: pip install 'lococo[chatglm]'"
        ) from error
    from google.protobuf.message import DecodeError

    other = f"{path} is not a SentencePiece model as ChatGLM2 and ChatGLM3 have; GLM-4 has native checkpoints already"
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(other) from error
    if not model.pieces:
        raise ValueError(other)
    _check_model(model, path)
    return model


def _check_model(model: Any, path: Path) -> None:
    trainer, normalizer, piece = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    types = {entry.piece: entry.type for entry in model.pieces}
    expected: dict[str, tuple[Any, Any]] = {
        "model_type": (trainer.model_type, trainer.BPE),
        "byte_fallback": (trainer.byte_fallback, True),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, True),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
        "precompiled_charsmap": (bytes(normalizer.precompiled_charsmap), b""),
        f"type of {UNKNOWN}": (types.get(UNKNOWN), piece.UNKNOWN),
        f"type of {END}": (types.get(END), piece.CONTROL),
        "user-defined or unused pieces": (sorted(set(types.values()) & {piece.USER_DEFINED, piece.UNUSED}), []),
    }
    for field, (value, right) in expected.items():
        if value != right:
            raise ValueError(f"{path}: {field} must be {right!r} as in ChatGLM2 and ChatGLM3, got {value!r}")


def _byte_pair_encoding(model: Any) -> BPE:
    from transformers.convert_slow_tokenizer import generate_merges

    normal = {
        piece.piece: (index, piece.score)
        for index, piece in enumerate(model.pieces)
        if piece.type == model.SentencePiece.NORMAL
    }
    ids = {piece: index for piece, (index, _) in normal.items()}
    merges = generate_merges(ids, {piece: score for piece, (_, score) in normal.items()})
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    return BPE(vocab, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
