import importlib.util
import os

import pytest
import torch
import transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
collect_ignore = (
    [] if importlib.util.find_spec("triton") else ["kernels/test_triton.py", "kernels/test_aot.py"]
)  # there is none for this system
release = tuple(map(int, transformers.__version__.split(".")[:2]))
# FSDP needs Transformers 5: before, it is refused (extension/test_sharding_refused.py).
if release < (5, 0):
    collect_ignore.append("extension/test_sharding.py")
# Transformers' server has the parts that ours needs from 5.8 on; before, it is refused (serving/test_available.py).
if release < (5, 8):
    collect_ignore.append("serving/test_server.py")
# Later releases give models of foreign code no generate (make test-chatglm runs these tests where they have one).
if release >= (4, 50):
    collect_ignore.append("models/test_remote_generate.py")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("any-machine", deadline=None)  # no test depends on the clock
    hypothesis.settings.load_profile("any-machine")
torch.set_num_threads(1)  # tiny models: a second thread only waits for the first


@pytest.fixture(autouse=True)
def no_precision_left_over():
    """Transformers 4 tells accelerate of bf16 in the environment, and so all later Trainers of the process."""
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny model and its tokenizer, which nothing writes to."""
    from tiny import tiny_llama  # which imports the library, and it Triton
    from words import word_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
