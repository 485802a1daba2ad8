"""TRL's GRPOTrainer generates with the compressed cache and learns from what it generated."""

import pytest
import torch
from datasets import Dataset
from small_training import Witness, arguments, lora, old_names, parts_with_gradients, token_logps, tokenizer, words
from tiny import tiny_llama
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from wrapped import CONFIG, patched

import lococo
from lococo.compat import cache_of
from lococo.state import patch_of

pytestmark = old_names
PROMPTS = Dataset.from_dict({"prompt": [words(30, 1), words(12, 2)]})
GROUP, NEW_TOKENS = 3, 24


class Run:
    """A trainer, what its reward was asked about, and what the model said while it generated."""

    def __init__(self, folder, peft_config=None, model=None, **options):
        self.witness, self.completions, self.caches, self.logits = Witness(), [], [], []
        sizes = dict(per_device_train_batch_size=GROUP, num_generations=GROUP, steps_per_generation=2)
        self.trainer = GRPOTrainer(
            model=model or patched(tiny_llama()),
            reward_funcs=self.reward,
            args=arguments(GRPOConfig, folder, max_completion_length=NEW_TOKENS, **sizes, **options),
            train_dataset=PROMPTS,
            processing_class=tokenizer(),
            peft_config=peft_config,
            callbacks=[self.witness],
        )
        self.generate_and_score = self.trainer._generate_and_score_completions
        self.trainer._generate_and_score_completions = self.keep

    def reward(self, prompts, completions, completion_ids, **kwargs):
        self.completions.append(completion_ids)
        return [float(len(set(ids))) for ids in completion_ids]

    def keep(self, inputs):
        model = patch_of(self.trainer.model).decoder
        hook = model.register_forward_hook(self.look)
        self.batch = self.generate_and_score(inputs)
        hook.remove()
        return self.batch

    def look(self, decoder, args, output):
        cache = cache_of(output)
        if cache is not None:
            self.caches.append(cache)
            self.logits.append(self.trainer.model.get_output_embeddings()(output.last_hidden_state[:, -1]))

    def train(self):
        self.trainer.train()
        return self.trainer.state.log_history[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A step of the whole model, and its log."""
    run = Run(tmp_path_factory.mktemp("grpo"))
    return run, run.train()


def test_completions_come_from_slots(whole):
    run, _ = whole
    assert len(run.caches) == NEW_TOKENS
    assert all(isinstance(cache, lococo.LoCoCoCache) for cache in run.caches)
    assert all(layer.entries.values.shape[2] <= CONFIG.capacity for layer in run.caches[-1].layers)


def test_prompts_are_padded_on_the_left(whole):
    run, _ = whole
    mask = run.batch["prompt_mask"]
    assert mask.sum(dim=1).unique().tolist() == [12, 30]
    assert mask[:, -1].all()


def of_whole_rows(batch, kind):
    return torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1)


def test_sampled_tokens_are_as_probable_when_they_are_learned_from(whole):
    """The policy that generates token by token is the one that the loss reads in one forward: the ratio is 1."""
    run, log = whole
    ids, kept = run.batch["completion_ids"], run.batch["completion_mask"].bool()
    generated = torch.stack(run.logits, dim=1).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    learned = run.batch["old_per_token_logps"]
    torch.testing.assert_close(learned[kept], generated[kept], rtol=0, atol=1e-4)
    rows, mask = of_whole_rows(run.batch, "ids"), of_whole_rows(run.batch, "mask")
    for model, is_policy in ((patched(tiny_llama()), True), (tiny_llama(), False)):
        with torch.no_grad():
            difference = token_logps(model, rows, mask)[:, -ids.shape[1] :] - generated
        assert (difference[kept].abs().max() < 1e-4) == is_policy
    assert log["clip_ratio/region_mean"] == 0


def test_rewards_flow_to_all_that_learns(whole):
    run, log = whole
    rewards = [len(set(ids)) for ids in run.completions[0]]
    assert log["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert run.batch["advantages"].abs().max() > 0.1
    assert parts_with_gradients(run.witness) == {"base", "heads"}


@pytest.mark.parametrize("modules_to_save", [None, ["lococo_head"]])
def test_with_adapters_the_reference_is_the_patched_model_without_them(modules_to_save, tmp_path):
    run = Run(tmp_path, lora(modules_to_save=modules_to_save), beta=0.1, max_steps=2)
    first = run.train()
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert run.trainer.state.log_history[1]["kl"] > 1e-6
    assert parts_with_gradients(run.witness) == ({"lora", "heads"} if modules_to_save else {"lora"})


def test_a_reference_that_trl_loads_itself_has_the_full_cache(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    model = patched(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    run = Run(tmp_path / "run", model=model, beta=0.1)
    assert run.train()["kl"] > 0.01
    assert not lococo.is_patched(run.trainer.ref_model)


def test_continuous_batching_is_refused(tmp_path):
    with pytest.raises(ValueError, match="generate_batch keeps pages of a full cache"):
        Run(tmp_path, use_transformers_continuous_batching=True).train()
