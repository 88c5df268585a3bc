#!/usr/bin/env bash
# The present course: MiniMind-3 (64M) from the mini files on the dataset's main branch; an evening on one 24 GB card.
set -euo pipefail

mm fetch --preset zero --tokenizer minimind-3 --yes
mm fetch dpo --yes
mm pack --max-len 1024

mm train pretrain --model minimind3 --data shards/pretrain_t2t_mini --batch-tokens 131072
mm train sft --data shards/sft_t2t_mini
mm train dpo --data shards/dpo
mm chat
