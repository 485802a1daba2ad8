"""What holds for a patched model whose linear layers another library quantised."""

import dataclasses

import torch
from peft import get_peft_model
from small_training import lora
from tiny import tiny_llama
from wrapped import CONFIG, IDS, assert_equal, head_values, logits, patched

import lococo

AMPLE = dataclasses.replace(CONFIG, num_slots=IDS.shape[1])


def small_model():
    """Layers as wide as the libraries' kernels want them."""
    return tiny_llama(hidden_size=64, intermediate_size=128)


def tokens(model):
    return model.generate(IDS, max_new_tokens=12, do_sample=False).tolist()


def check_slots(make, atol):
    """With slots enough the quantised model's own logits, with few others, and its own again without the patch.

    Parameters
    ----------
    make : callable
        Returns the same quantised model every time.
    atol : float
        How far apart may be what was summed in another order.
    """
    full = logits(make())
    assert (full - logits(small_model())).abs().max() > 0.01
    assert_equal(logits(patched(make(), AMPLE)), full, atol=atol)
    model = patched(make())
    compressed = logits(model)
    assert_equal(compressed[:, : CONFIG.num_slots], full[:, : CONFIG.num_slots], atol=atol)
    assert (compressed - full).abs().max() > 1
    assert tokens(model) != tokens(lococo.unpatch_model(model))
    assert_equal(logits(model), full, atol=0)


def check_pieces(model, atol):
    """A patched model reads a text in pieces as it reads it at once."""
    at_once, cache, pieces = logits(model), None, []
    for ids in IDS.split((13, 1, 30, 20), dim=1):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_equal(torch.cat(pieces, dim=1), at_once, atol=atol)


def check_dequantized(model, weights, atol):
    """A patched quantised model has the logits of a plain patched one with its dequantised weights."""
    plain = small_model()
    missing, surplus = plain.load_state_dict(weights, strict=False)
    assert weights and not surplus
    assert_equal(logits(model), logits(patched(plain)), atol=atol)


def check_heads(make, folder):
    """Heads stay numbers, and those of a quantised model are those of the plain one."""
    model, plain = patched(make()), patched(small_model())
    assert all(value.is_floating_point() for value in head_values(model))
    assert all(map(torch.equal, head_values(model), head_values(plain)))
    lococo.save_heads(plain, folder)
    assert_equal(logits(lococo.patch_model(make(), heads=folder)), logits(model), atol=0)


def check_adapters(make):
    """LoRA on a patched quantised model: adapters and named heads learn, and the loss falls."""
    model = get_peft_model(patched(make()), lora(modules_to_save=["lococo_head"]))
    learned = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert {"lora_" in name or "lococo_head" in name for name in learned} == {True}
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    optimizer, losses = torch.optim.SGD(learned.values(), lr=0.05), []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert not any(torch.equal(parameter, before[name]) for name, parameter in learned.items())
