"""Answers of ``generate``, and what beams must give, by reading every text again."""

import torch
from tiny import tiny_ids

NEW_TOKENS = 16
ROWS = [tiny_ids(1, length, seed=length)[0] for length in (31, 19, 8)]


def answer(model, ids, **arguments):
    """Token ids, prompt included."""
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **arguments})


def beam_search(model, ids, num_beams):
    """Texts and mean log-probabilities, best first; every text is read again for each token."""
    beams = [(0.0, ids)]
    for _ in range(NEW_TOKENS):
        grown = []
        for score, text in beams:
            best = model(text).logits[0, -1].log_softmax(-1).topk(num_beams)
            grown += [
                (score + log_probability, torch.cat([text, token.view(1, 1)], dim=1))
                for log_probability, token in zip(best.values.tolist(), best.indices, strict=True)
            ]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return torch.cat([text for _, text in beams]), torch.tensor([score / NEW_TOKENS for score, _ in beams])
