"""The published sets: what is asked, for how long an answer, and how it is scored."""

from __future__ import annotations

import dataclasses
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.long import records
from experiments.long.items import Item, Task
from experiments.long.records import Reader, Record


@dataclasses.dataclass(frozen=True)
class Source:
    """Files a set is read from, the first that there is.

    Attributes
    ----------
    local : tuple of (str, Reader)
        Files under ``--data-dir`` and their forms.
    repository, archive, member : str
        Dataset on the Hub, a zip file of it, and the file in that.
    reader : Reader
        Form of that file.
    """

    local: tuple[tuple[str, Reader], ...]
    repository: str
    archive: str
    member: str
    reader: Reader

    def read(self, data_dir: Path | None) -> tuple[list[Record], str]:
        """All records, from ``data_dir`` or, for None, from the Hub, and the name of what they were read from.

        Raises
        ------
        FileNotFoundError
            If the folder has none of the files.
        """
        if data_dir is None:
            from huggingface_hub import hf_hub_download

            with zipfile.ZipFile(hf_hub_download(self.repository, self.archive, repo_type="dataset")) as archive:
                return list(self.reader(archive.read(self.member).decode("utf-8"))), f"{self.repository}/{self.member}"
        for name, reader in self.local:
            if (data_dir / name).is_file():
                return list(reader((data_dir / name).read_text(encoding="utf-8"))), name
        raise FileNotFoundError(f"{data_dir} has none of {', '.join(name for name, _ in self.local)}")


@dataclasses.dataclass(frozen=True)
class LongSet:
    """A set of questions about documents.

    Attributes
    ----------
    before, after : str
        What stands before and after the document; ``{question}`` and ``{options}`` are put in.
    """

    source: Source
    metric: str
    max_new_tokens: int
    before: str
    after: str
    first_line: bool = False

    def task(self, name: str, data_dir: Path | None, limit: int | None, seed: int) -> Task:
        """The set as a task of at most ``limit`` items, drawn by ``seed`` and left in their order."""
        found, source = self.source.read(data_dir)
        if limit is not None and limit < len(found):
            found = [found[place] for place in sorted(random.Random(seed).sample(range(len(found)), limit))]
        items = tuple(self._item(record) for record in found)
        return Task(name, self.metric, self.max_new_tokens, items, self.first_line, source=source)

    def _item(self, record: Record) -> Item:
        is_continued = self.first_line or self.metric == "edit_similarity"
        if record.is_prompt:
            return Item("", record.document, "", record.references, record.options, is_continued=is_continued)
        options = "\n".join(f"({letter}) {option}" for letter, option in zip("ABCD", record.options, strict=False))
        after = self.after.replace("{options}", options).replace("{question}", record.question)
        return Item(self.before, record.document, after, record.references, record.options, is_continued=is_continued)


def _scrolls(
    config: str, reader: Reader, local: Sequence[tuple[str, Reader]], metric: str, tokens: int, before: str, after: str
) -> LongSet:
    member = f"{config}/validation.jsonl"
    files = ((f"scrolls/{member}", reader), *local)
    return LongSet(Source(files, "tau/scrolls", f"{config}.zip", member, reader), metric, tokens, before, after)


def _longbench(name: str, metric: str, tokens: int, before: str, after: str, first_line: bool = False) -> LongSet:
    files = (
        (f"longbench/{name}.jsonl", records.longbench),
        (f"minilongbench/MiniLongBench_{name}.json", records.minilongbench),
    )
    source = Source(files, "THUDM/LongBench", "data.zip", f"data/{name}.jsonl", records.longbench)
    return LongSet(source, metric, tokens, before, after, first_line)


_BRIEF = "\n\nAnswer the question about the text above in as few words as you can.\n\nQuestion: {question}\nAnswer:"
_ARTICLE = (
    "\n\nAnswer the question about the article above in as few words as you can: yes, no, a phrase, or unanswerable "
    "if the article does not say.\n\nQuestion: {question}\nAnswer:"
)
_CHOICE = (
    "\n\nChoose the right answer to the question about the story above.\n\nQuestion: {question}\n{options}\n\nAnswer:"
)
_MEETING = "\n\nAnswer the query about the meeting above in a few sentences.\n\nQuery: {question}\nAnswer:"
_REPORT = ("Here is a government report.\n\n", "\n\nWrite a summary of the report above, one page long.\n\nSummary:")
_EPISODE = (
    "Here is the transcript of a TV show.\n\n",
    "\n\nSummarize the episode above in one paragraph.\n\nSummary:",
)
_NEWS = ("Here are news articles.\n\n", "\n\nWrite one summary of all the articles above, one page long.\n\nSummary:")
_PASSAGES = "Here are several passages.\n\n"
_CODE = "Here is code that ends before a line.\n\n"
_STORY = "Here is a story.\n\n"
_TRANSCRIPT = "Here is the transcript of a meeting.\n\n"
_PAPER = "Here is a scientific article.\n\n"
_BRIEF_ZH = "\n\n请根据上文用尽量简短的中文回答问题。\n\n问题：{question}\n回答："

SCROLLS = {
    "scrolls-quality": _scrolls(
        "quality",
        records.scrolls_choice,
        [("leval/quality.jsonl", records.leval_choice)],
        "accuracy",
        16,
        _STORY,
        _CHOICE,
    ),
    "scrolls-qasper": _scrolls(
        "qasper",
        records.scrolls_question,
        [("leval/scientific_qa.jsonl", records.leval)],
        "f1",
        128,
        _PAPER,
        _ARTICLE,
    ),
    "scrolls-summ_screen_fd": _scrolls(
        "summ_screen_fd",
        records.scrolls_summary,
        [("leval/tv_show_summ.jsonl", records.leval)],
        "rouge_geometric",
        512,
        *_EPISODE,
    ),
    "scrolls-gov_report": _scrolls(
        "gov_report",
        records.scrolls_summary,
        [("leval/gov_report_summ.jsonl", records.leval)],
        "rouge_geometric",
        1024,
        *_REPORT,
    ),
    "scrolls-qmsum": _scrolls(
        "qmsum",
        records.scrolls_question,
        [("qmsum/val.jsonl", records.qmsum), ("leval/meeting_summ.jsonl", records.leval)],
        "rouge_geometric",
        512,
        _TRANSCRIPT,
        _MEETING,
    ),
    "scrolls-narrative_qa": _scrolls("narrative_qa", records.scrolls_question, [], "f1", 128, _STORY, _BRIEF),
}

_LONGBENCH: dict[str, tuple[Any, ...]] = {
    "narrativeqa": ("f1", 128, _STORY, _BRIEF),
    "qasper": ("f1", 128, _PAPER, _ARTICLE),
    "multifieldqa_en": ("f1", 64, "", _BRIEF),
    "multifieldqa_zh": ("f1_zh", 64, "", _BRIEF_ZH),
    "hotpotqa": ("f1", 32, _PASSAGES, _BRIEF),
    "2wikimqa": ("f1", 32, _PASSAGES, _BRIEF),
    "musique": ("f1", 32, _PASSAGES, _BRIEF),
    "dureader": (
        "rouge_l_zh",
        128,
        "以下是几篇文章。\n\n",
        "\n\n请根据以上文章回答问题。\n\n问题：{question}\n回答：",
    ),
    "gov_report": ("rouge_l", 512, *_REPORT),
    "qmsum": ("rouge_l", 512, _TRANSCRIPT, _MEETING),
    "multi_news": ("rouge_l", 512, *_NEWS),
    "vcsum": ("rouge_l_zh", 512, "以下是一场会议的记录。\n\n", "\n\n请写一段文字总结以上会议的内容。\n\n总结："),
    "trec": (
        "classification",
        64,
        "Name the type of the last question, as in the examples.\n\n",
        "\n{question}",
        True,
    ),
    "triviaqa": (
        "f1",
        32,
        "Answer the last question about its passage, as in the examples.\n\n",
        "\n{question}",
        True,
    ),
    "samsum": ("rouge_l", 128, "Summarize the last dialogue, as in the examples.\n\n", "\n{question}", True),
    "lsht": ("classification", 64, "请仿照例子判断最后一篇新闻的类别。\n\n", "\n{question}", True),
    "passage_count": (
        "count",
        32,
        "Some of the paragraphs below occur more than once.\n\n",
        "\n\nHow many different paragraphs are there above? Answer with a number.\n\nAnswer:",
    ),
    "passage_retrieval_en": (
        "retrieval",
        32,
        "Here are numbered paragraphs.\n\n",
        "\n\nHere is a summary of one of the paragraphs above:\n\n{question}\n\nWhich one? Answer "
        'with its number, as in "Paragraph 1".\n\nAnswer:',
    ),
    "passage_retrieval_zh": (
        "retrieval",
        32,
        "以下是编了号的段落。\n\n",
        '\n\n下面的摘要出自以上哪个段落？\n\n{question}\n\n请只回答编号，例如"段落1"。\n\n回答：',
    ),
    "lcc": ("edit_similarity", 64, _CODE, "Next line:\n"),
    "repobench-p": ("edit_similarity", 64, _CODE, "{question}Next line:\n"),
}
LONGBENCH = {f"longbench-{name}": _longbench(name, *entry) for name, entry in _LONGBENCH.items()}

_SQUALITY = Source(
    (("squality/dev.jsonl", records.squality),),
    "tau/zero_scrolls",
    "squality.zip",
    "squality/validation.jsonl",
    records.zero_scrolls,
)
SETS = {
    **SCROLLS,
    **LONGBENCH,
    "squality": LongSet(
        _SQUALITY,
        "rouge_geometric",
        512,
        _STORY,
        "\n\nAnswer the question about the story above in a few paragraphs.\n\nQuestion: {question}\nAnswer:",
    ),
}
