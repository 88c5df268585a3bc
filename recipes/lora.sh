#!/usr/bin/env bash
# A trained model learns who it is, then some medicine, by adapters of a few MB each: a laptop is enough.
# Run it where another recipe ran: it begins from the newest sft run under runs/ (another one: --init RUN) and packs with
# its tokenizer, data/tokenizer.
set -euo pipefail

mm fetch lora_identity lora_medical --yes
mm pack data/lora_identity.jsonl data/lora_medical.jsonl --max-len 512

mm train sft --lora 8 --data shards/lora_identity --epochs 20 --batch-tokens 2048
mm chat --prompt "你是谁？" --temperature 0
mm train sft --lora 16 --data shards/lora_medical --epochs 2
mm chat
