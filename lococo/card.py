"""The model card of saved heads."""

from __future__ import annotations

import json
from typing import Any

from lococo.hub import HUB_ID


def model_card(content: dict[str, Any], source: str) -> str:
    """README.md of a heads folder: ``content`` is its JSON, ``source`` where the card says the heads are."""
    name = content["base_model"]["name_or_path"]
    base = name or content["base_model"]["model_type"]
    slots = content["config"]["num_slots"]
    average = " on average" if content["config"].get("slots_per_head") else ""
    if content["config"].get("compress_windows") is False:
        average += " (layers with a sliding window keep what it sees)"
    # The Hub takes nothing but an id here.
    base_model = f'base_model: "{name}"\n' if HUB_ID.fullmatch(name) else ""
    card = f"""---
library_name: lococo
{base_model}tags:
- lococo
- kv-cache-compression
---

# LoCoCo heads for {base}

Trained heads that keep the key-value cache of {base} at {slots} slots per layer and KV head{average}, whatever the
length of the text. The base model itself is unchanged and not in this folder.

```python
import lococo
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
lococo.patch_model(model, heads={json.dumps(source)})
```

## Config

{_table("field", content["config"])}"""
    if content["metrics"]:
        card += f"\n## Metrics\n\n{_table('metric', content['metrics'])}"
    return card


def _table(header: str, values: dict[str, Any]) -> str:
    rows = [(header, "value"), ("---", "---"), *((name, json.dumps(value)) for name, value in values.items())]
    return "".join("| {} | {} |\n".format(*(str(cell).replace("|", r"\|") for cell in row)) for row in rows)
