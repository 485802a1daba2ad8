"""Few-shot tasks: what is asked, what is read once, and that the scores are those of lm-eval."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from task_lines import LINES, arc, arc_of_the_hub, race, triviaqa, winogrande, words, write_rows
from tiny import tiny_llama
from words import WORDS, word_tokenizer

import lococo
from experiments.task_files import write_tasks
from lococo.cli.main import main
from lococo.evaluation.harness import LoCoCoLM, PrefixLM
from lococo.evaluation.prefixes import PrefixReader
from lococo.evaluation.tasks import FewShotTask, evaluate_tasks, parse_task, read_tasks
from lococo.methods import plan_runs

CONFIG = lococo.LoCoCoConfig(12, block_size=8, kernel_size=5, gate_init=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of task files."""
    folder = tmp_path_factory.mktemp("data")
    for name, (line, scored, examples) in LINES.items():
        (folder / name).mkdir()
        write_rows(folder / name / scored, [line(index) for index in range(6 if examples else 10)])
        if examples:
            write_rows(folder / name / examples, [line(index) for index in range(20, 26)])
    write_tasks(folder, folder / "tasks", shots=4)
    return folder / "tasks"


def few_shot(name, shots, data, seed=0):
    (task,) = read_tasks([f"{name}:{shots}"], data, seed)
    return task


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<s>"  # lm-eval ends an answer there
    return tokenizer


def open_model():
    """A model whose heads blend."""
    model = lococo.patch_model(tiny_llama(), CONFIG)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lococo_head" in name and "gate" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def requests_of(data, name, shots, lm):
    return [request for prompt in prompts_of(few_shot(name, shots, data), lm) for request in prompt.requests]


def prompts_of(task, lm, limit=None):
    return [task.prompt(lm, question) for question in task.questions(limit)]


def short_answers(requests):
    for request in requests:
        request.arguments = (request.args[0], {"until": [WORDS[5], "\n"], "max_gen_toks": 20, "do_sample": False})
    return requests


def copies(requests):
    return [Instance(each.request_type, each.doc, each.arguments, each.idx) for each in requests]


def assert_same(scores, expected, atol=1e-5):
    assert len(scores) == len(expected) > 0
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected], abs=atol)


# Scores


@pytest.mark.parametrize("name", [name for name in LINES if name != "triviaqa"])
@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_scores_with_shared_beginnings_are_those_of_lm_eval(data, tokenizer, name, model):
    ours, theirs = PrefixLM(model(), tokenizer=tokenizer), HFLM(model(), tokenizer=tokenizer, backend="causal")
    requests = requests_of(data, name, 6, ours)
    assert min(len(ours.tok_encode(request.args[0])) for request in requests) > CONFIG.capacity
    assert_same(ours.loglikelihood(copies(requests)), theirs.loglikelihood(copies(requests)))
    assert ours.reader.kept


def test_enough_slots_score_as_the_model_without_any(data, tokenizer):
    ours = LoCoCoLM(tiny_llama(), tokenizer=tokenizer, num_slots=256, block_size=8)
    theirs = HFLM(tiny_llama(), tokenizer=tokenizer, backend="causal")
    for name in ("arc_easy", "winogrande"):
        requests = requests_of(data, name, 4, ours)
        assert_same(ours.loglikelihood(copies(requests)), theirs.loglikelihood(copies(requests)))
    requests = short_answers(requests_of(data, "triviaqa", 4, ours))
    assert ours.generate_until(copies(requests)) == theirs.generate_until(copies(requests))


def test_few_slots_score_otherwise(data, tokenizer):
    ours = PrefixLM(open_model(), tokenizer=tokenizer)
    theirs = HFLM(tiny_llama(), tokenizer=tokenizer, backend="causal")
    requests = requests_of(data, "arc_easy", 4, ours)
    pairs = zip(ours.loglikelihood(copies(requests)), theirs.loglikelihood(copies(requests)), strict=True)
    assert max(abs(one - other) for (one, _), (other, _) in pairs) > 0.1


@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_answers_with_shared_beginnings_are_those_of_lm_eval(data, tokenizer, model):
    ours, theirs = PrefixLM(model(), tokenizer=tokenizer), HFLM(model(), tokenizer=tokenizer, backend="causal")
    requests = short_answers(requests_of(data, "triviaqa", 4, ours))
    answers = ours.generate_until(copies(requests))
    assert answers == theirs.generate_until(copies(requests))
    assert len(set(answers)) > 1
    assert ours.reader.kept


def test_rolling_likelihoods_are_those_of_lm_eval(tokenizer):
    ours, theirs = PrefixLM(open_model(), tokenizer=tokenizer), HFLM(open_model(), tokenizer=tokenizer)
    asked = [Instance("loglikelihood_rolling", {}, (words(*range(0, 300, step)),), 0) for step in (3, 7)]
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)


def test_examples_before_every_question_are_read_twice_and_no_more():
    model = tiny_llama()
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args or [kwargs.get("input_ids")])[0].shape[1]), with_kwargs=True
    )
    examples = [1 + index * index % 60 for index in range(50)]
    reader = PrefixReader(model)
    for question in range(4):
        reader.score([*examples, 10 + question, 5, 6], [[7, 8], [9]])
    assert read == [52, 2, *[50, 2, 2], *[2, 2], *[2, 2]]
    assert list(map(len, reader.kept)) == [50]


def test_only_the_last_used_beginnings_are_kept():
    reader = PrefixReader(tiny_llama())
    for start in (1, 2, 3):
        for end in (4, 5, 6):
            reader.score([start] * 40 + [end, 7], [[8]])
    assert [prefix[0] for prefix in reader.kept] == [2, 3]


# Prompts


def test_prompts_are_those_of_lm_eval_with_the_same_examples_before_every_question(data, tokenizer):
    task = few_shot("arc_easy", 2, data, seed=1)
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    items = prompts_of(task, lm, limit=3)
    prompts = [item.requests[0].args[0] for item in items]
    examples = [text.rsplit("\n\n", 1)[0] for text in prompts]
    assert len(items) == 3 and len(set(examples)) == 1 and len(set(prompts)) == 3
    possible = [f"{arc(index)['query']} {arc(index)['choices'][index % 4]}" for index in range(20, 26)]
    assert all(example in possible for example in examples[0].split("\n\n"))
    assert [prompt.rsplit("\n\n", 1)[1] for prompt in prompts] == [arc(index)["query"] for index in range(3)]
    assert [request.args[1] for request in items[2].requests] == [f" {choice}" for choice in arc(2)["choices"]]
    others = few_shot("arc_easy", 2, data, seed=0)
    assert prompts_of(others, lm, limit=1)[0].requests[0].args[0] != prompts[0]
    assert others.digest(others.questions(1)[0]) != task.digest(task.questions(1)[0])


def test_more_shots_begin_with_the_examples_of_fewer(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    few, more = (prompts_of(few_shot("hellaswag", shots, data), lm)[0].requests[0].args[0] for shots in (2, 5))
    assert more.startswith(few.rsplit("\n\n", 1)[0])


def test_race_asks_the_last_question_of_an_article(data, tokenizer):
    item = prompts_of(few_shot("race", 1, data), PrefixLM(tiny_llama(), tokenizer=tokenizer))[0]
    question = item.requests[0].args[0].split("Article: ")[-1]
    first, last = race(0)["questions"]
    assert question == f"{race(0)['article']}\n\nQuestion: {first}\nAnswer: {arc(0)['choices'][1]}\n{last}"


def test_winogrande_reads_both_sentences_and_scores_what_follows(data, tokenizer):
    item = prompts_of(few_shot("winogrande", 1, data), PrefixLM(tiny_llama(), tokenizer=tokenizer))[0]
    sentence, options = winogrande(0)["sentence"], [winogrande(0)[name] for name in ("option1", "option2")]
    before, after = sentence.split("_")
    assert [request.args[0].split("\n\n")[1] for request in item.requests] == [before + each for each in options]
    assert {request.args[1] for request in item.requests} == {after}


def test_triviaqa_takes_its_examples_from_the_end_and_scores_the_rest(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    task = few_shot("triviaqa", 4, data)
    items = prompts_of(task, lm)
    assert [question["question"] for question in task.questions()] == [
        triviaqa(index)["question"] for index in range(6)
    ]
    assert all(triviaqa(index)["question"] in items[0].requests[0].args[0] for index in range(6, 10))


def test_prompts_that_are_too_long_lose_whole_examples(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    whole = prompts_of(few_shot("arc_easy", 6, data), lm)[0]
    assert whole.shots == 6
    longest = max(lm.tokens_read(request.args)[1] for request in whole.requests)
    exact = PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=longest)
    assert prompts_of(few_shot("arc_easy", 6, data), exact)[0].requests[0].args == whole.requests[0].args
    shorter = PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=longest - 1)
    cut = prompts_of(few_shot("arc_easy", 6, data), shorter)[0]
    parts = whole.requests[0].args[0].split("\n\n")
    assert cut.shots == 5
    assert cut.requests[0].args[0].split("\n\n") == [*parts[:5], parts[-1]]
    assert cut.tokens == len(tokenizer(cut.requests[0].args[0]).input_ids)
    with pytest.raises(ValueError, match=r"arc_easy: a question alone has \d+ tokens, more than the 5"):
        prompts_of(few_shot("arc_easy", 6, data), PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=5))[0]


@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_the_middle_of_long_prompts_is_left_out_if_allowed(data, tokenizer, model):
    cut = PrefixLM(model(), tokenizer=tokenizer, max_length=40, truncate="middle")
    whole = PrefixLM(model(), tokenizer=tokenizer)
    ids = cut.tok_encode(words(*range(60)))
    answers = [cut.tok_encode(words(*numbers)) for numbers in ((1, 2), (5,))]
    kept = [*ids[:20], *ids[-19:]]
    asked = [(("", ""), ids, answer) for answer in answers]
    expected = whole._loglikelihood_tokens([(("", ""), kept, answer) for answer in answers])
    assert_same(cut._loglikelihood_tokens(asked), expected)
    settings = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    (answer,) = cut.generate_until([Instance("generate_until", {}, (words(*range(60)), settings), 0)])
    kept = tokenizer.decode([*ids[:15], *ids[-15:]])
    assert len(cut.tok_encode(kept)) == 30
    assert [answer] == whole.generate_until([Instance("generate_until", {}, (kept, settings), 0)])
    question = few_shot("arc_easy", 6, data).prompt(
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=5, truncate="middle"), arc_of_the_hub(0)
    )
    assert (question.shots, question.tokens) == (0, 5)
    with pytest.raises(ValueError, match="truncate must be middle, or not given, got 'left'"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, truncate="left")


def test_prompts_in_a_chat_template(data, tokenizer):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w0 {{ messages[0].content }} w60"
    (task,) = read_tasks(["arc_easy:2"], data, chat=True)
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    prompt = prompts_of(task, lm, limit=1)[0].requests[0].args[0]
    plain = prompts_of(few_shot("arc_easy", 2, data), lm, limit=1)[0].requests[0].args[0]
    assert prompt == f"w0 {plain} w60"


def test_lm_eval_itself_is_told_of_prompts_that_are_too_long(data, tokenizer):
    requests = requests_of(data, "arc_easy", 4, PrefixLM(tiny_llama(), tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"have \d+ tokens, max_length is 30"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=30).loglikelihood(copies(requests))
    asked = [Instance("generate_until", {}, (words(*range(10)), {"until": ["\n"]}), 0)]
    with pytest.raises(ValueError, match="have 266 tokens, max_length is 265"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=265).generate_until(asked)


# Results


def run(data, tokenizer, output, names=("arc_easy:2", "winogrande:3", "triviaqa:1"), methods=("full", "h2o"), **more):
    tasks = read_tasks(names, data)
    return evaluate_tasks(
        tiny_llama(), tokenizer, tasks, plan_runs(methods, [12], 8), output, "lococo x", limit=4, **more
    )


def test_table_holds_what_it_says(data, tokenizer, tmp_path):
    rows = run(data, tokenizer, tmp_path / "out" / "tasks", seed=0)
    content = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert content["rows"] == rows and content["command"] == "lococo x"
    assert (content["seed"], content["max_length"]) == (0, 2048)
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in ("arc_easy", "winogrande", "triviaqa") for method in ("full", "h2o")
    ]
    assert [row["metric"] for row in rows[::2]] == ["acc", "acc", "exact_match"]
    lm = HFLM(tiny_llama(), tokenizer=tokenizer)
    right, tokens = 0, 0
    prompts = prompts_of(few_shot("arc_easy", 2, data), PrefixLM(tiny_llama(), tokenizer=tokenizer), limit=4)
    for index, item in enumerate(prompts):
        scores = [score for score, _ in lm.loglikelihood(copies(item.requests))]
        right += scores.index(max(scores)) == index % 4
        tokens += len(tokenizer(item.requests[0].args[0]).input_ids)
    full = rows[0]
    assert (full["score"], full["prompt_tokens"], full["items"]) == (right / 4, tokens / 4, 4)
    assert full["stderr"] == pytest.approx((right / 4 * (1 - right / 4) / 4) ** 0.5)
    assert (rows[1]["num_slots"], rows[1]["block_size"], rows[1]["shots_that_fit"]) == (12, 8, 2)
    assert (tmp_path / "out" / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "tasks.md").read_text().count("\n") == len(rows) + 4


@pytest.mark.slow
def test_killed_run_goes_on_where_it_stopped(data, tokenizer, tmp_path, monkeypatch):
    expected = run(data, tokenizer, tmp_path / "whole", seed=0)
    answer, calls = FewShotTask.answer, []

    def counted(*args):
        if len(calls) == 9:
            raise KeyboardInterrupt
        calls.append(args)
        return answer(*args)

    monkeypatch.setattr(FewShotTask, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tokenizer, tmp_path / "cut", seed=0)
    assert not (tmp_path / "cut.json").exists()
    again = []
    monkeypatch.setattr(FewShotTask, "answer", lambda *args: again.append(args) or answer(*args))
    assert run(data, tokenizer, tmp_path / "cut", seed=0) == expected
    assert len(calls) + len(again) == 2 * 3 * 4
    assert not (tmp_path / "cut.partial.jsonl").exists()


def test_right_answers_score_one(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    for name in LINES:
        task = few_shot(name, 2, data)
        for index, question in enumerate(task.questions()):
            item = task.prompt(lm, question)
            gold = {"race": 3, "triviaqa": 0, "winogrande": index % 2}.get(name, index % 4)
            for wrong in (0, 1):
                chosen = (gold + wrong) % len(item.requests)
                scores = [(-float(place != chosen), False) for place in range(len(item.requests))]
                texts = [words(5, 6) if wrong else f" {words(3 * index).upper()}"]

                class Oracle:
                    def loglikelihood(self, requests, disable_tqdm, scores=scores):
                        return scores

                    def generate_until(self, requests, disable_tqdm, texts=texts):
                        return texts

                assert bool(task.answer(Oracle(), question, item)) is not bool(wrong)


def test_command_measures_with_heads(data, checkpoint, tmp_path, capsys):
    lococo.save_heads(open_model(), tmp_path / "heads")
    status = main(
        ["eval", "tasks", "--model", str(checkpoint), "--include-path", str(data), "--tasks", "hellaswag:3", "race:2"]
        + ["--methods", "full", "--heads", str(tmp_path / "heads"), "--block-size", "8", "--limit", "3"]
        + ["--output", str(tmp_path / "tasks")]
    )
    assert status == 0
    content = json.loads((tmp_path / "tasks.json").read_text())
    assert content["command"].startswith("lococo eval tasks --model ")
    assert [(row["method"], row["items"]) for row in content["rows"]] == 2 * [("full", 3), ("lococo", 3)]
    assert capsys.readouterr().out.count("\n") >= 6


# What is wrong is said before the model is loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_eazy:3"], "unknown task 'arc_eazy': lm-eval has arc_easy"),
        (["--tasks", "arc_easy"], "a task is NAME:SHOTS, arc_easy:4 for instance, got 'arc_easy'"),
        (["--tasks", "arc_easy:-1"], "got 'arc_easy:-1'"),
        (["--tasks", "arc_easy:7"], "arc_easy: 7 shots need as many examples, there are 6"),
        (["--tasks", "arc_easy:2", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
        (["--tasks", "arc_easy:2", "--limit", "0"], "Invalid value for '--limit'"),
        (["--tasks", "arc_easy:2", "--methods", "h20"], "unknown method 'h20'"),
        (["--tasks", "arc_easy:2", "--heads", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(data, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    assert main(["eval", "tasks", "--model", "x", "--include-path", str(data), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: ")]
    assert len(errors) == 1 and message in errors[0]


def test_without_files_and_hub_the_way_out_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OSError, match="race cannot be had from the Hub; task files of local data: --include-path"):
        read_tasks(["race:2"])


def test_names_and_shots():
    assert [parse_task(each) for each in ("race:2", "triviaqa:0")] == [("race", 2), ("triviaqa", 0)]


def test_groups_are_all_of_their_tasks(data, tmp_path):
    group = {"group": "both", "task": ["arc_easy", "winogrande"]}
    for file in data.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    assert [(task.name, task.shots) for task in read_tasks(["both:3"], tmp_path)] == [
        ("arc_easy", 3),
        ("winogrande", 3),
    ]


def test_figures_that_are_no_numbers_are_scored_by_the_task(data):
    class Pairs:
        OUTPUT_TYPE, task_name = "generate_until", "pairs"

        def aggregation(self):
            return {"rouge": lambda pairs: sum(one == other for one, other in pairs) / len(pairs), "other": None}

        def fewshot_docs(self):
            return []

    task = FewShotTask(Pairs(), 0)
    assert task.metric == "rouge" and task.score([("a", "a"), ("a", "b")]) == (0.5, None)
    Pairs.OUTPUT_TYPE = "loglikelihood_rolling"
    with pytest.raises(ValueError, match="pairs measures the perplexity of texts"):
        FewShotTask(Pairs(), 0)


# lm-eval's own command


def test_registered_in_lm_eval_under_its_name(checkpoint):
    lm = get_model("lococo").create_from_arg_string(
        f"pretrained={checkpoint},method=h2o,num_slots=12,block_size=8", {"batch_size": 1, "device": "cpu"}
    )
    assert lococo.is_patched(lm.model)
    assert lm.model.model.lococo_patch.config == lococo.LoCoCoConfig.h2o(12, block_size=8)


def test_registered_model_takes_heads_and_refuses_unknown_methods(tokenizer, tmp_path):
    lococo.save_heads(open_model(), tmp_path / "heads")
    lm = LoCoCoLM(tiny_llama(), tokenizer=tokenizer, heads=str(tmp_path / "heads"))
    assert lm.model.model.lococo_patch.config == CONFIG
    assert not lococo.is_patched(LoCoCoLM(tiny_llama(), tokenizer=tokenizer, method="full").model)
    with pytest.raises(ValueError, match="unknown method 'h20'"):
        LoCoCoLM("nowhere", method="h20")


BLOCKED = """
import sys
import lococo, lococo.cli.main, lococo.evaluation.tasks
assert "lm_eval" not in sys.modules
sys.modules["lm_eval"] = None
sys.exit(lococo.cli.main.main(["eval", "tasks", "--model", "x"]))
"""


@pytest.mark.slow
def test_a_missing_lm_eval_is_named_and_importing_needs_none():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2
    assert "pip install lococo[eval]" in done.stderr.splitlines()[-1]
