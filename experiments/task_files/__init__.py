"""Local files as task files of lm-eval: what ``lococo eval tasks --include-path FOLDER`` reads.

``python -m experiments.task_files --data-dir FOLDER --haystack FILE --output FOLDER`` writes them. Each includes
lm-eval's own task file of that name and says where the data come from instead of the Hub; prompts, filters and metrics
stay lm-eval's. SCROLLS is left out: its tasks (0.4.13) load their metric from the Hub when they are made, and import a
part of Transformers that release 5 no longer has.
"""
